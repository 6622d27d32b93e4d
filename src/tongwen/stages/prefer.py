"""prefer: train on chosen and rejected answers; write an adapter on the model of the stage before."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tongwen.core import artifact, console, distributed
from tongwen.core.errors import MissingPackage, RecipeError
from tongwen.core.i18n import _
from tongwen.recipe.schema import Recipe
from tongwen.workflows.stage_inputs import base_of_stage, training_settings


def settings(recipe: Recipe) -> dict[str, Any]:
    """Return the settings that decide this stage's result."""
    return training_settings(recipe, "prefer")


def check_ahead(recipe: Recipe) -> None:
    """Raise now, before the earlier stages run, if this stage would fail."""
    if find_spec("trl") is None:
        raise MissingPackage("trl", "prefer", "preference")
    if distributed.is_launched():
        raise RecipeError(
            _("this stage trains in one process, but a launcher started {count}").format(
                count=distributed.world_size()
            ),
            place="prefer",
            remedy=_("run the other stages with the launcher (--until sft), then this one without it"),
        )


def run(recipe: Recipe, out: Path) -> artifact.Artifact:
    """Encode the preferences and train on them."""
    from tongwen.workflows.training.job import train_stage
    from tongwen.workflows.training.preferences import make_preference_job

    assert recipe.prefer
    prepared = artifact.open_artifact(out.parent / "prepare", "prepare")
    console.header("prefer", f"{base_of_stage(recipe, 'prefer')} · {recipe.prefer.method}")
    job = make_preference_job(recipe, prepared, out.parent / "tokens" / "prefer")
    return train_stage(job, out)
