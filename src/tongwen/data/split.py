"""What is held out of training, and in which order samples are learned: by seed alone, the same on every machine."""

from __future__ import annotations

import random
from typing import Any, TypeVar

from tongwen.errors import DataError
from tongwen.language import say

Record = TypeVar("Record")


def order(count: int, seed: int, *words: Any) -> list[int]:
    """A permutation of range(count). Python's Mersenne twister seeded by a string is fixed across versions."""
    indices = list(range(count))
    random.Random("/".join(map(str, (seed, *words)))).shuffle(indices)  # noqa: S311 (not for secrets)
    return indices


def hold_out(records: list[Record], amount: float, seed: int) -> tuple[list[Record], list[Record]]:
    """(kept, held out), both in the order of the records. amount: a share below 1, or a count.

    A share holds out at least one record where there are two. Raises DataError when nothing would be left to learn.
    """
    count = round(len(records) * amount) if amount < 1 else int(amount)
    if 0 < amount < 1 and len(records) > 1:
        count = max(count, 1)
    if count >= len(records) and count:
        raise DataError(
            say(
                f"held_out: {amount:g} takes all {len(records)} rows; none would be left to learn",
                f"held_out: {amount:g} 会取走全部 {len(records)} 行，无可训练",
            ),
            place="prepare.held_out",
        )
    chosen = set(order(len(records), seed, "held_out")[:count])
    kept = [record for index, record in enumerate(records) if index not in chosen]
    return kept, [record for index, record in enumerate(records) if index in chosen]
