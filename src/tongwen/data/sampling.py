"""What is held out of training, how sources are mixed, and in which order samples are learned: by seed alone, the same on
every machine."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from typing import Any

import numpy as np

from tongwen.core.errors import DataError
from tongwen.core.i18n import _
from tongwen.data.dedup import GOLDEN, mix


def order(count: int, seed: int, *keys: Any) -> list[int]:
    """A permutation of range(count). Python's Mersenne twister seeded by a string is fixed across versions."""
    indices = list(range(count))
    random.Random("/".join(map(str, (seed, *keys)))).shuffle(indices)  # noqa: S311 (not for secrets)
    return indices


def choose_held_out(free: np.ndarray, amount: float, seed: int, at_most: int | None = None) -> np.ndarray:
    """Sorted indices of the records that are held out. free: (N,) bool, the records to choose from; amount: a share of
    them below 1, of `at_most` records, or a number of records.

    Those with the smallest hashes of seed and index are taken: whether another record is there changes nothing.
    A share holds out at least one record where there are two. Raises DataError when nothing would be left to learn.
    """
    count = int(free.sum())
    wanted = round(count * amount) if amount < 1 else int(amount)
    if 0 < amount < 1 and count > 1:
        wanted = min(max(wanted, 1), at_most or count)
    if wanted >= count and wanted:
        raise DataError(
            _("held_out: {amount:g} takes all {count} rows; none would be left to train on").format(
                amount=amount, count=count
            ),
            place="prepare.held_out",
        )
    start = np.uint64(int.from_bytes(hashlib.blake2b(f"{seed}/held_out".encode(), digest_size=8).digest(), "little"))
    keys, chosen = np.zeros(0, np.uint64), np.zeros(0, np.int64)
    for begin in range(0, len(free) if wanted else 0, 1 << 20):  # blocks: the memory does not grow with the data
        block = np.flatnonzero(free[begin : begin + (1 << 20)]) + begin
        keys = np.concatenate([keys, mix(block.astype(np.uint64) * np.uint64(GOLDEN) + start)])
        chosen = np.concatenate([chosen, block])
        if len(keys) > wanted:
            least = np.argpartition(keys, wanted - 1)[:wanted]
            keys, chosen = keys[least], chosen[least]
    return np.sort(chosen)


def passes_of(tokens: Sequence[int], weights: Sequence[float | None], shares: Sequence[float | None]) -> list[float]:
    """Passes over each source per epoch. tokens: what each source holds; a source with neither weight nor share is passed
    over once.

    Shares are reached by passing more or less often over the sources that have one; when all have one, none is repeated.
    """
    passes = [1.0 if weight is None else weight for weight in weights]
    total = sum(share for share in shares if share is not None)
    if not total:
        return passes
    if all(share is not None for share in shares):
        whole = min(held / share for held, share in zip(tokens, shares, strict=True) if share and held)
    else:
        rest = sum(held * passed for held, passed, share in zip(tokens, passes, shares, strict=True) if share is None)
        whole = rest / (1 - total)
    return [
        passed if share is None else share * whole / max(1, held)
        for held, passed, share in zip(tokens, passes, shares, strict=True)
    ]


def draw(sources: np.ndarray, passes: Sequence[float], seed: int, epoch: int) -> list[int]:
    """The samples of an epoch in their order. sources: (S,) the source of each sample; passes: per source and epoch.

    What one epoch leaves out of a source is what the next begins with.
    """
    if all(times == 1 for times in passes):
        return order(len(sources), seed, "epoch", epoch)
    chosen: list[int] = []
    for source, times in enumerate(passes):
        members = np.flatnonzero(sources == source)
        if len(members):
            ring = members[order(len(members), seed, "source", source)]
            begin, end = (round(turn * times * len(members)) for turn in (epoch, epoch + 1))
            chosen += ring[np.arange(begin, end) % len(members)].tolist()
    return [chosen[index] for index in order(len(chosen), seed, "epoch", epoch)]
