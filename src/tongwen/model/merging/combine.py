"""Combine adapters that were trained independently on one base: a weighted sum of their changes (linear), or TIES.

TIES (Yadav et al. 2023, arXiv:2306.01708) keeps the largest numbers of each change, elects a sign for each weight, and
averages the changes that agree with it. It works on the changes of W, tensor by tensor, not on LoRA's A and B, because
only their product is meaningful. All in fp64, so that recomputing a single row gives the same result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

Array = Any


class CombinedAt(Protocol):
    """One adapter's change of one tensor. place: the adapter's folder."""

    place: str

    def apply(self, block: Array, begin: int, end: int) -> Array: ...


@dataclass(frozen=True)
class Combination:
    """How to combine changes. how: linear or ties; weights: adapter folder -> weight; density: share of a change's
    numbers that TIES keeps; scale: factor of the combined change."""

    how: str
    weights: Mapping[str, float]
    density: float = 0.2
    scale: float = 1.0


class CombinedChange:
    """All adapters' changes of one tensor as one step. cuts: for TIES, each adapter's smallest magnitude to keep."""

    additive = False
    pair = None

    def __init__(self, steps: Sequence[CombinedAt], mix: Combination, cuts: Sequence[float]) -> None:
        self.steps, self.mix, self.cuts = steps, mix, cuts
        self.weights = [mix.weights[step.place] for step in steps]

    @property
    def is_zero(self) -> bool:
        return all(getattr(step, "is_zero", False) for step in self.steps)

    def apply(self, block: Array, begin: int, end: int) -> Array:
        """Return the changed rows, in the block's dtype."""
        exact = block.astype(np.float64)
        changes = [changed(step, exact, begin, end) for step in self.steps]
        if self.mix.how == "ties":
            added = _elected(changes, self.weights, self.cuts)
        else:
            added = sum(weight * change for weight, change in zip(self.weights, changes, strict=True))
        return (exact + self.mix.scale * added).astype(block.dtype)


def changed(step: CombinedAt, exact: Array, begin: int, end: int) -> Array:
    """Return one adapter's change of rows of a tensor, in fp64."""
    return step.apply(exact.copy(), begin, end) - exact


def magnitude_of(change: Array) -> Array:
    """Return |change| in fp32, to compare with a cut."""
    return np.abs(change).astype(np.float32)


def find_cut(magnitudes: Callable[[], Iterator[Array]], keep: int) -> float:
    """Return the `keep`-th largest of many non-negative fp32 numbers, in two passes without storing them."""
    high = np.zeros(1 << 16, np.int64)
    for block in magnitudes():  # as integers, the bits of non-negative floats have the same order as the floats
        high += np.bincount(block.reshape(-1).view(np.uint32) >> 16, minlength=1 << 16)
    above = np.cumsum(high[::-1])
    top = (1 << 16) - 1 - int(np.searchsorted(above, keep))
    low = np.zeros(1 << 16, np.int64)
    for block in magnitudes():
        bits = block.reshape(-1).view(np.uint32)
        low += np.bincount(bits[bits >> 16 == top] & 0xFFFF, minlength=1 << 16)
    left = keep - int(above[(1 << 16) - 1 - top] - high[top])
    bottom = (1 << 16) - 1 - int(np.searchsorted(np.cumsum(low[::-1]), left))
    return float(np.uint32(top << 16 | bottom).view(np.float32))


def _elected(changes: Sequence[Array], weights: Sequence[float], cuts: Sequence[float]) -> Array:
    kept = [
        np.where(magnitude_of(change) >= cut, weight * change, 0.0)
        for change, weight, cut in zip(changes, weights, cuts, strict=True)
    ]
    sign = np.sign(sum(kept))
    total, share = np.zeros_like(changes[0]), np.zeros_like(changes[0])
    for change, weight in zip(kept, weights, strict=True):
        agrees = np.sign(change) * sign > 0
        total += np.where(agrees, change, 0.0)
        share += np.where(agrees, abs(weight), 0.0)
    return np.divide(total, share, out=np.zeros_like(total), where=share > 0)
