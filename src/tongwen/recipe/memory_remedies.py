"""Changes to a recipe that reduce a training stage's memory, the cheapest first."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from pydantic import ValidationError

from tongwen.core.i18n import _
from tongwen.recipe.schema import Recipe
from tongwen.recipe.training import Pretrain, Training

MIN_LENGTH = 512  # tokens of a sample; other remedies come before shorter ones


def cheaper(
    recipe: Recipe,
    name: str,
    longest: int,
    micro_tokens: int,
    half: str = "",
    helps: Callable[[Training, int], bool] = lambda section, tokens: True,
) -> Iterator[str]:
    """Yield changes to the recipe, each on top of those before: those that cost time first, then length, precision.

    Args:
        recipe: The recipe with a stage that needs too much memory.
        name: The name of that stage.
        longest: Tokens of the longest sample.
        micro_tokens: Tokens of the fullest micro-batch.
        half: A 16-bit `precision` that the device supports; empty if there is none.
        helps: Returns whether the changed section needs less memory, with this many tokens at once.
    """
    for setting, value in _candidates(recipe, getattr(recipe, name), longest, micro_tokens, half):
        # An adapter alone is no model to export.
        needs_merge = recipe.export and not recipe.merge and "lora" in str(value)
        changes = {f"{name}.{setting}": value, **({"merge": {}} if needs_merge else {})}
        changed = _changed(recipe, changes)
        tokens = min(micro_tokens, int(value)) if setting in ("micro_batch_tokens", "max_length") else micro_tokens
        if changed is not None and helps(getattr(changed, name), tokens):
            recipe, micro_tokens = changed, tokens
            yield " ".join(f"{path}={str(value).lower()}" for path, value in changes.items())


def last_resort(section: Training) -> str:
    """Return the remedy for when no change to the recipe is enough."""
    if section.sharded_by:
        return _("a smaller base, a larger GPU, or more GPUs: --devices N")
    return _("a smaller base, a larger GPU, or several GPUs: engine: fsdp2, --devices N")


def _candidates(
    recipe: Recipe, section: Training, longest: int, micro_tokens: int, half: str
) -> Iterator[tuple[str, Any]]:
    """Yield (setting, value) pairs that may help, in the order in which `cheaper` tries them."""
    if micro_tokens > longest:
        yield "micro_batch_tokens", max(longest, 16)  # the recipe takes no fewer
    if section.activation_checkpointing != "on":
        yield "activation_checkpointing", "on"
    if half and section.precision == "fp32":
        yield "precision", half
    if section.optimizer == "adamw":
        yield "optimizer", "adamw_8bit"
    if not section.offload:
        yield "offload", True
    while longest > MIN_LENGTH:
        longest //= 2
        yield "max_length", longest
    if isinstance(section, Pretrain) and section.train == "full" and not section.phases:
        yield "train", "lora+embeddings" if recipe.vocab else "lora"  # new rows have to learn
    elif section.adapter.method == "full":
        yield "adapter.method", "lora"
    if section.adapter.method in ("lora", "full"):
        yield "adapter.method", "qlora"


def _changed(recipe: Recipe, changes: dict[str, Any]) -> Recipe | None:
    """Return the recipe with these settings, named by dotted paths; None if they break its rules."""
    data = recipe.model_dump(exclude_unset=True)
    for path, value in changes.items():
        *above, last = path.split(".")
        section = data
        for part in above:
            section = section.setdefault(part, {})
        section[last] = value
    try:
        return Recipe.model_validate(data)
    except ValidationError:
        return None
