"""export: write the run's model in the formats of other programs, each in its own folder.

The source is the merged model, or the whole model of the last stage before. Each format is written and read back by
itself; the stage is finished when all are.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from tongwen.core import artifact, console
from tongwen.recipe.schema import Recipe
from tongwen.workflows.stage_inputs import base_of_stage, open_model_before


def settings(recipe: Recipe) -> dict[str, Any]:
    assert recipe.export
    return {"export": recipe.export.model_dump(mode="json"), "from": Path(base_of_stage(recipe, "export")).name}


def check_ahead(recipe: Recipe) -> None:
    """Raise now, before the earlier stages run, if a format could not be written."""
    from tongwen.workflows import model_formats

    assert recipe.export
    model_formats.check_ahead(recipe.base, recipe.export.formats, recipe.export.quantize, f"{recipe.out}/merge")


def run(recipe: Recipe, out: Path) -> artifact.Artifact:
    """Write all formats of the recipe to `out`."""
    from tongwen.hub import upload
    from tongwen.workflows import model_formats

    assert recipe.export
    finished = open_model_before(recipe, "export")
    source = replace(model_formats.open_source(str(finished.path)), title=recipe.name)
    if recipe.export.push:
        upload.check_name(recipe.export.push)
    with artifact.create(out, "export", {"model": finished.as_parent()}, settings(recipe)) as draft:
        for form in recipe.export.formats:
            made = model_formats.convert(source, form, draft.path / form, recipe.export.quantize, {"to": form})
            draft.facts[form] = {"fingerprint": made.fingerprint, "files": list(made.manifest["files"])}
        if recipe.export.push:
            draft.facts["pushed"] = upload.push(draft.path / "hf", recipe.export.push, console.notice)
            console.success(str(draft.facts["pushed"]))
    for form in recipe.export.formats:  # where it lies now: it was written beside its place
        model_formats.report_written(out / form)
    assert draft.artifact
    return draft.artifact
