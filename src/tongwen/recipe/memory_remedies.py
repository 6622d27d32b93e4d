"""What lets a training stage do with less memory: changes of its recipe, the cheapest first, each one that it can say."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from pydantic import ValidationError

from tongwen.core.i18n import say
from tongwen.recipe.schema import Pretrain, Recipe, Training

SHORTEST = 512  # tokens of a sample; below that, other things are given up first


def cheaper(
    recipe: Recipe,
    name: str,
    longest: int,
    together: int,
    half: str = "",
    helps: Callable[[Training, int], bool] = lambda section, tokens: True,
) -> Iterator[str]:
    """Changes of the recipe, each on top of those before: first what costs time, then length, then precision.

    longest: tokens of the longest sample; together: of the fullest micro-batch; half: a `precision` of 16 bits that the device
    computes in, if it does; helps: whether it needs less with the changed section and so many tokens at once.
    """
    for word, value in _words(recipe, getattr(recipe, name), longest, together, half):
        folds = recipe.export and not recipe.merge and "lora" in str(value)  # an adapter alone is no model to export
        changes = {f"{name}.{word}": value, **({"merge": {}} if folds else {})}
        changed = _changed(recipe, changes)
        tokens = min(together, int(value)) if word in ("micro_batch_tokens", "max_length") else together
        if changed is not None and helps(getattr(changed, name), tokens):
            recipe, together = changed, tokens
            yield " ".join(f"{path}={str(value).lower()}" for path, value in changes.items())


def last_resort(section: Training) -> str:
    """What is left when no word of the recipe suffices."""
    if section.shares:
        return say(
            "a smaller base, a larger GPU, or more of them: --devices N", "更小的底座、更大或更多的 GPU：--devices N"
        )
    return say(
        "a smaller base, a larger GPU, or several: engine: fsdp2, --devices N",
        "更小的底座、更大的 GPU，或多卡：engine: fsdp2，--devices N",
    )


def _words(recipe: Recipe, section: Training, longest: int, together: int, half: str) -> Iterator[tuple[str, Any]]:
    if together > longest:
        yield "micro_batch_tokens", max(longest, 16)  # the recipe takes no fewer
    if section.activation_checkpointing != "on":
        yield "activation_checkpointing", "on"
    if half and section.precision == "fp32":
        yield "precision", half
    if section.optimizer == "adamw":
        yield "optimizer", "adamw_8bit"
    if not section.offload:
        yield "offload", True
    while longest > SHORTEST:
        longest //= 2
        yield "max_length", longest
    if isinstance(section, Pretrain) and section.learns_in_full and not section.phases:
        yield "train", "lora+embeddings" if recipe.vocab else "lora"  # whose new rows have to learn
    elif section.adapter.method == "full":
        yield "adapter.method", "lora"
    if section.adapter.method in ("lora", "full"):
        yield "adapter.method", "qlora"


def _changed(recipe: Recipe, changes: dict[str, Any]) -> Recipe | None:
    """The recipe with these words, named by dotted paths; None where its own rules are against them."""
    data = recipe.model_dump(exclude_unset=True)
    for path, value in changes.items():
        *above, last = path.split(".")
        section = data
        for word in above:
            section = section.setdefault(word, {})
        section[last] = value
    try:
        return Recipe.model_validate(data)
    except ValidationError:
        return None
