"""synthesize: generate dialogues with an endpoint; write them with their provenance, and the rejected ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tongwen.core import artifact
from tongwen.recipe.schema import Recipe

# These decide how requests are sent, not what they ask for.
_REQUEST_SETTINGS = {
    "key",
    "concurrency",
    "requests_per_minute",
    "seconds",
    "attempts",
    "pause",
    "at_most",
    "price",
    "use_proxy",
}


def settings(recipe: Recipe) -> dict[str, Any]:
    """Return the settings that decide this stage's result."""
    assert recipe.synthesize
    return {"synthesize": recipe.synthesize.model_dump(mode="json", exclude=_REQUEST_SETTINGS), "seed": recipe.seed}


def check_ahead(recipe: Recipe) -> None:
    """Check nothing: only a request shows whether the endpoint works."""


def run(recipe: Recipe, out: Path) -> artifact.Artifact:
    """Request dialogues from the endpoint until there are as many as the recipe asks for."""
    from tongwen.workflows.data_synthesis import synthesize

    assert recipe.synthesize
    return synthesize(recipe.synthesize, recipe.seed, settings(recipe), out)
