"""The folder of a run: what may be written there, the resolved recipe, and whether finished stages are as they were left.

Data may lie beside a run; everything of these names is the run's: `recipe.yaml`, and a folder for each stage.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import yaml

from tongwen.core import artifact, originals
from tongwen.core.errors import RecipeError
from tongwen.core.file_lock import is_lock
from tongwen.core.i18n import _
from tongwen.recipe.load import dump
from tongwen.recipe.references import references
from tongwen.recipe.schema import STAGES, Recipe
from tongwen.recipe.yaml_reader import read_foreign
from tongwen.workflows.run_lock import LOCK

RESOLVED = {"name", "base", "out", "seed", "devices", "track"}  # keys of each recipe that v0.1 resolved


def check_folder(recipe: Recipe, names: Sequence[str], *, redone: Sequence[str] = (), file: str = "") -> None:
    """Raise RecipeError if a run would replace or move what tongwen did not write. Only looks.

    names: stages that are to run; redone: those whose folders are moved aside; file: the recipe's.
    """
    out, sources = Path(recipe.out), list(inputs_of(recipe))
    originals.check_output(out, sources, inside=True)
    for name in names:
        folder = out / name
        originals.check_output(folder, [*sources, file], moves=name in redone)
        artifact.check_working(folder)
        if os.path.lexists(folder) and not artifact.is_artifact(folder):
            raise RecipeError(
                _("this name is needed for a stage of the run, but tongwen did not write what it holds"),
                place=str(folder),
                remedy=_("move it away, or choose another `out`"),
            )
    if names:
        _check_recipe(out / "recipe.yaml")
    if os.path.lexists(out / LOCK) and not is_lock(out / LOCK):
        raise RecipeError(
            _("this name is needed for the lock of the run, but tongwen did not write this file"),
            place=str(out / LOCK),
            remedy=_("move it away, or choose another `out`"),
        )


def write_recipe(recipe: Recipe) -> None:
    """Write the resolved recipe into the run's folder."""
    file = Path(recipe.out) / "recipe.yaml"
    _check_recipe(file)
    originals.write_sealed(file, dump(recipe), originals.YAML, replaces=True)


def inputs_of(recipe: Recipe) -> Iterator[str]:
    """Yield what the recipe reads: models, data and settings, by path or name."""
    own = f"{recipe.out}/synthesize/dialogues.jsonl" if recipe.synthesize else ""
    yield from (one.value for one in references(recipe) if one.is_read and one.value != own)


def _check_recipe(file: Path) -> None:
    if os.path.lexists(file) and not originals.is_sealed(file) and not _is_of_v01(file):
        raise RecipeError(
            _("this file is yours: tongwen did not write it, or it was changed since, and a run writes its own here"),
            place=str(file),
            remedy=_("move it out of the run's folder and run it from there, or choose another `out`"),
        )


def _is_of_v01(file: Path) -> bool:
    """Whether v0.1 resolved this recipe: it has every key, and nothing that would be lost when it is written again."""
    try:
        text = file.read_text(encoding="utf-8")
        data = read_foreign(text, is_json=False)
    except (OSError, ValueError):
        return False
    return (
        isinstance(data, dict)
        and data.keys() >= RESOLVED
        and any(file.with_name(f"{name}{end}").is_dir() for name in STAGES for end in ("", ".partial"))
        and text == yaml.safe_dump(data, allow_unicode=True, sort_keys=False, width=100)
    )
