"""vocab: learn new pieces from prepared text; write the base with a larger vocabulary."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tongwen.core import artifact
from tongwen.recipe.schema import Recipe


def settings(recipe: Recipe) -> dict[str, Any]:
    assert recipe.vocab
    return {"vocab": recipe.vocab.model_dump(mode="json"), "seed": recipe.seed, "base": recipe.base}


def check_ahead(recipe: Recipe) -> None:
    """Check nothing: the texts come from `prepare`."""


def run(recipe: Recipe, out: Path) -> artifact.Artifact:
    """Learn new pieces, report whether they pay, and write the base with rows for them."""
    from tongwen.workflows.vocab_extension import extend_vocabulary

    return extend_vocabulary(recipe, settings(recipe), out)
