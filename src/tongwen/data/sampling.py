"""Choose held-out records, mix sources and order samples. The seed alone decides, the same on every machine."""

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
    """Return a permutation of range(count). Python's Mersenne Twister seeded by a string is stable across versions."""
    indices = list(range(count))
    random.Random("/".join(map(str, (seed, *keys)))).shuffle(indices)  # noqa: S311 (not for secrets)
    return indices


def choose_held_out(free: np.ndarray, amount: float, seed: int, at_most: int | None = None) -> np.ndarray:
    """Return the sorted indices of the held-out records. free: (N,) bool, the records to choose from; amount: a share
    below 1 (limited to `at_most` records) or a number of records.

    The records with the smallest hashes of seed and index are taken, so that other records do not affect the choice.
    A share holds out at least one record if there are two. Raises DataError when no record would be left to train on.
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
    for begin in range(0, len(free) if wanted else 0, 1 << 20):  # in blocks: memory does not grow with the data
        block = np.flatnonzero(free[begin : begin + (1 << 20)]) + begin
        keys = np.concatenate([keys, mix(block.astype(np.uint64) * np.uint64(GOLDEN) + start)])
        chosen = np.concatenate([chosen, block])
        if len(keys) > wanted:
            least = np.argpartition(keys, wanted - 1)[:wanted]
            keys, chosen = keys[least], chosen[least]
    return np.sort(chosen)


def passes_of(tokens: Sequence[int], weights: Sequence[float | None], shares: Sequence[float | None]) -> list[float]:
    """Return the passes over each source per epoch. tokens: tokens of each source; a source with neither weight nor share
    gets one pass.

    Sources with a share get more or fewer passes to reach it; when all sources have a share, none is repeated.
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
    """Return the samples of an epoch in order. sources: (S,) the source of each sample; passes: per source and epoch.

    The next epoch begins with the samples of a source that this epoch leaves out.
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
