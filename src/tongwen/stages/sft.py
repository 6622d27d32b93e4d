"""sft: fine-tune the base on prepared dialogues; write an adapter or a whole model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tongwen.core import artifact, console
from tongwen.model.adapters.settings import check_continued
from tongwen.recipe.schema import Recipe
from tongwen.workflows.stage_inputs import base_of_stage, training_settings


def settings(recipe: Recipe) -> dict[str, Any]:
    """Return the settings that decide this stage's result."""
    return training_settings(recipe, "sft")


def check_ahead(recipe: Recipe) -> None:
    """Raise now, before the earlier stages run, if this stage would fail."""
    assert recipe.sft
    check_continued(recipe.sft.adapter, "sft")


def run(recipe: Recipe, out: Path) -> artifact.Artifact:
    """Encode the dialogues and train on them."""
    from tongwen.workflows.training.dialogues import make_dialogue_job
    from tongwen.workflows.training.job import train_stage

    assert recipe.sft
    prepared = artifact.open_artifact(out.parent / "prepare", "prepare")
    console.header("sft", f"{base_of_stage(recipe, 'sft')} · {recipe.sft.adapter.method}")
    job = make_dialogue_job(recipe, prepared, out.parent / "tokens" / "sft")
    return train_stage(job, out)
