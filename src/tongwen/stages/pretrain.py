"""pretrain: train the base on prepared documents; write an adapter or a whole model.

Training has as many phases as the recipe. The held-out text of each language is scored on the way to show forgetting.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tongwen.core import artifact, console
from tongwen.model.adapters.settings import check_continued
from tongwen.recipe.schema import Recipe
from tongwen.workflows.stage_inputs import base_of_stage, training_settings


def settings(recipe: Recipe) -> dict[str, Any]:
    """Return the settings that decide this stage's result."""
    return training_settings(recipe, "pretrain")


def check_ahead(recipe: Recipe) -> None:
    """Raise now, before the earlier stages run, if this stage would fail."""
    assert recipe.pretrain
    check_continued(recipe.pretrain.adapter, "pretrain")


def run(recipe: Recipe, out: Path) -> artifact.Artifact:
    """Encode the documents and train on them."""
    from tongwen.workflows.training.documents import make_document_job
    from tongwen.workflows.training.job import train_stage

    assert recipe.pretrain
    prepared = artifact.open_artifact(out.parent / "prepare", "prepare")
    console.header("pretrain", f"{base_of_stage(recipe, 'pretrain')} · {' → '.join(recipe.pretrain.trains)}")
    job = make_document_job(recipe, prepared, out.parent / "tokens" / "pretrain")
    return train_stage(job, out)
