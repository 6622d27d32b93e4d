"""merge: merge adapters into their base and write a model folder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from tongwen.core import console, originals
from tongwen.core.artifact import Artifact
from tongwen.core.errors import RecipeError
from tongwen.core.i18n import _
from tongwen.model.merging.combine import Combination
from tongwen.workflows.merging import MergeOptions, merge


def run(base: str, adapters: list[str], out: str, options: MergeOptions, *, again: bool) -> int:
    result = merge_into(base, adapters, out, options, again=again)
    console.emit({"out": out, **{key: value for key, value in result.manifest.items() if key != "tensors"}})
    return 0


def merge_into(base: str, adapters: list[str], out: str, options: MergeOptions, *, again: bool) -> Artifact:
    """Merge into a new folder. again: rename an existing folder instead of refusing."""
    target = Path(out)
    originals.clear_path(target, [base, *adapters], again=again)
    chosen = {
        "base": base,
        "adapters": adapters,
        **{key: value for key, value in asdict(options).items() if key != "force"},
    }
    return merge(base, adapters, target, chosen, options)


def make_combination(
    method: str, adapters: Sequence[str], weights: Sequence[float], density: float, scale: float
) -> Combination:
    """Return how to combine the adapters. Raises RecipeError if the weights do not fit them."""
    problem = ""
    if len(adapters) < 2 or len(set(adapters)) < len(adapters):
        problem = _("combining needs at least two adapters, each once")
    elif weights and len(weights) != len(adapters):
        problem = _("{weights_count} weights given for {adapters_count} adapters").format(
            weights_count=len(weights), adapters_count=len(adapters)
        )
    elif not 0 < density <= 1:
        problem = _("density {density:g} must be above 0 and at most 1").format(density=density)
    if problem:
        raise RecipeError(
            problem, place="tongwen merge --combine", remedy="--adapter A --weight 0.5 --adapter A2 --weight 0.5"
        )
    shares = weights or [1 / len(adapters)] * len(adapters)
    return Combination(
        method, {str(Path(name)): share for name, share in zip(adapters, shares, strict=True)}, density, scale
    )
