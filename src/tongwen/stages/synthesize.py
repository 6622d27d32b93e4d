"""synthesize: an endpoint and something to start from in; dialogues with their provenance out, and what was not taken."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tongwen.core import artifact
from tongwen.recipe.schema import Recipe

# These decide how it is asked, not for what.
_HOW = {"key", "concurrency", "requests_per_minute", "seconds", "attempts", "pause", "at_most", "price", "use_proxy"}


def settings(recipe: Recipe) -> dict[str, Any]:
    """What decides this stage's result."""
    assert recipe.synthesize
    return {"synthesize": recipe.synthesize.model_dump(mode="json", exclude=_HOW), "seed": recipe.seed}


def check_ahead(recipe: Recipe) -> None:
    """The endpoint answers when it is asked."""


def run(recipe: Recipe, out: Path) -> artifact.Artifact:
    """Ask an endpoint for dialogues until there are as many as the recipe wants."""
    from tongwen.workflows.data_synthesis import synthesize

    assert recipe.synthesize
    return synthesize(recipe.synthesize, recipe.seed, settings(recipe), out)
