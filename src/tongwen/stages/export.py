"""export: the run's finished model in the forms that other programs read, each in a folder of its own.

What goes in is the merged model, or the one that `sft` trained in full. Each form is written and read back by itself; the
stage is finished when all are.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from tongwen import artifact, forms
from tongwen.recipe.schema import Recipe


def settings(recipe: Recipe) -> dict[str, Any]:
    assert recipe.export
    return {"export": recipe.export.model_dump(mode="json"), "from": _source(recipe)}


def run(recipe: Recipe, out: Path) -> artifact.Artifact:
    """All forms of the recipe under `out`."""
    assert recipe.export
    finished = artifact.open_artifact(out.parent / _source(recipe), "model" if recipe.merge else "sft")
    source = replace(forms.open_source(str(finished.path)), title=recipe.name)
    with artifact.create(out, "export", {"model": finished.as_parent()}, settings(recipe)) as draft:
        for form in recipe.export.formats:
            made = forms.convert(source, form, draft.path / form, recipe.export.quantize, {"to": form})
            draft.facts[form] = {"fingerprint": made.fingerprint, "files": list(made.manifest["files"])}
    assert draft.artifact
    return draft.artifact


def _source(recipe: Recipe) -> str:
    return "merge" if recipe.merge else "sft"
