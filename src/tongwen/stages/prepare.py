"""prepare: read the recipe's sources; write documents, dialogues, held-out and rejected rows, and the ledger."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tongwen.core import artifact
from tongwen.recipe.schema import Recipe
from tongwen.workflows.prepared_data import prepare_settings


def settings(recipe: Recipe) -> dict[str, Any]:
    return prepare_settings(recipe)


def check_ahead(recipe: Recipe) -> None:
    """Check nothing: problems appear only when the files are read."""


def run(recipe: Recipe, out: Path) -> artifact.Artifact:
    """Read and clean the recipe's files, drop duplicates, hold some records out."""
    from tongwen.workflows.data_preparation import prepare

    assert recipe.prepare
    return prepare(recipe.prepare, recipe.seed, settings(recipe), out)
