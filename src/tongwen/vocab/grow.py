"""Initialise new rows of the input embedding and the head from the base's rows.

The default is the mean of the rows of a piece's old tokens. SmolLM2 with 2,000 Chinese pieces then needs 3.07 bits per
byte before training, the base 2.50. The mean of all rows gives 4.52, and random numbers, as in transformers in 2023,
6.83 (bench/new_rows.py, which also tests other initialisations).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

KINDS = ("subtoken_mean", "mean", "normal")
ROWS_AT_ONCE = 256
Rows = Any  # (n, H) fp32
ReadRows = Callable[[int, int], Rows]  # rows [begin, end) of the old matrix


def iter_rows(
    kind: str,
    parts: Sequence[Sequence[int]],
    old_rows: int,
    read: ReadRows,
    *,
    padding: int = 0,
    deviation: float = 0.02,
    seed: int = 0,
) -> Iterator[Rows]:
    """Yield blocks of new rows in order, then `padding` rows without a token (the mean, no outliers in the softmax).

    parts:     the old ids of each new row's piece
    old_rows:  rows of the base that belong to a token
    deviation: standard deviation of `normal`: the model's initializer_range
    """
    mean: Rows = mean_row(old_rows, read) if kind == "mean" or padding else None
    random = np.random.default_rng(seed)
    for begin in range(0, len(parts), ROWS_AT_ONCE):
        some = parts[begin : begin + ROWS_AT_ONCE]
        if kind == "mean":
            yield np.tile(mean, (len(some), 1))
        elif kind == "normal":
            yield random.normal(0.0, deviation, (len(some), read(0, 1).shape[1])).astype(np.float32)
        else:
            yield np.stack([_mean_of(read, part) for part in some])
    for _ in range(padding):
        yield mean[None]


def mean_row(rows: int, read: ReadRows) -> Rows:
    """Return the mean (H,) of the first rows, read in blocks."""
    total: Any = 0.0
    for begin in range(0, rows, ROWS_AT_ONCE):
        total = total + read(begin, min(begin + ROWS_AT_ONCE, rows)).sum(axis=0, dtype=np.float64)
    return (total / rows).astype(np.float32)


def _mean_of(read: ReadRows, part: Sequence[int]) -> Rows:
    return np.mean([read(index, index + 1)[0] for index in part], axis=0, dtype=np.float32)
