"""pretrain: prepared documents and a base in; the same model that has read them out, as an adapter or whole.

It learns in as many phases as the recipe has. On the way each language's held-out text is scored, so that forgetting
shows.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tongwen.core import artifact, console
from tongwen.model.adapters.settings import check_continued
from tongwen.recipe.schema import Recipe
from tongwen.workflows.stage_inputs import base_of_stage, training_settings


def settings(recipe: Recipe) -> dict[str, Any]:
    """What decides this stage's result."""
    return training_settings(recipe, "pretrain")


def check_ahead(recipe: Recipe) -> None:
    """Raise what would refuse it, before the stages that lead to it."""
    assert recipe.pretrain
    check_continued(recipe.pretrain.adapter, "pretrain")


def run(recipe: Recipe, out: Path) -> artifact.Artifact:
    """Encode the documents, and learn from them."""
    from tongwen.workflows.training.documents import document_job
    from tongwen.workflows.training.job import train_stage

    assert recipe.pretrain
    prepared = artifact.open_artifact(out.parent / "prepare", "prepare")
    console.header("pretrain", f"{base_of_stage(recipe, 'pretrain')} · {' → '.join(recipe.pretrain.trains)}")
    job = document_job(recipe, prepared, out.parent / "tokens" / "pretrain")
    return train_stage(job, out)
