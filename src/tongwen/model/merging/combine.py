"""Adapters that were trained beside each other on one base, combined: their changes summed (linear), or by TIES.

TIES (Yadav et al. 2023, arXiv:2306.01708) keeps of each change its largest numbers, lets the adapters elect a sign for
each number of the weight, and averages those that agree. It is done on W's changes themselves, tensor by tensor, and not
on the A and B of LoRA, whose products are what was learned. fp64 throughout, so that a row recomputed alone is the same.
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
    """How changes are combined. how: linear or ties; weights: adapter folder -> weight; density: share of a change's
    numbers that TIES keeps; scale: of what is added."""

    how: str
    weights: Mapping[str, float]
    density: float = 0.2
    scale: float = 1.0


class CombinedChange:
    """All adapters' changes of one tensor as one step. cuts: the smallest magnitude that each keeps, for TIES."""

    additive = False
    pair = None

    def __init__(self, steps: Sequence[CombinedAt], mix: Combination, cuts: Sequence[float]) -> None:
        self.steps, self.mix, self.cuts = steps, mix, cuts
        self.weights = [mix.weights[step.place] for step in steps]

    @property
    def is_zero(self) -> bool:
        return all(getattr(step, "is_zero", False) for step in self.steps)

    def apply(self, block: Array, begin: int, end: int) -> Array:
        """The changed rows, in the block's number type."""
        exact = block.astype(np.float64)
        changes = [changed(step, exact, begin, end) for step in self.steps]
        if self.mix.how == "ties":
            added = _elected(changes, self.weights, self.cuts)
        else:
            added = sum(weight * change for weight, change in zip(self.weights, changes, strict=True))
        return (exact + self.mix.scale * added).astype(block.dtype)


def changed(step: CombinedAt, exact: Array, begin: int, end: int) -> Array:
    """What one adapter adds to rows of a tensor, in fp64."""
    return step.apply(exact.copy(), begin, end) - exact


def magnitude_of(change: Array) -> Array:
    """|change| in fp32: what is compared with a cut."""
    return np.abs(change).astype(np.float32)


def find_cut(magnitudes: Callable[[], Iterator[Array]], keep: int) -> float:
    """The `keep`-th largest of many fp32 numbers that are not negative; they are gone through twice, and never held."""
    high = np.zeros(1 << 16, np.int64)
    for block in magnitudes():  # the bits of such numbers are in the numbers' order
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
