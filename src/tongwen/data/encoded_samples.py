"""Encoded samples before they are stored, and the batch that a token store takes."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import NamedTuple

import numpy as np

from tongwen.core.i18n import _
from tongwen.core.records import Dialogue, Document
from tongwen.data.encoder import Piece
from tongwen.data.token_store import Batch, spans_of

BATCH = 1000  # dialogues tokenised in one call of the tokenizer library


class EncodedSample(NamedTuple):
    """A sample before it is stored. dialogue: index of its dialogue in the batch."""

    dialogue: int
    pieces: list[Piece]
    stop: bool
    size: int  # tokens


@contextmanager
def without_gc() -> Iterator[None]:
    """Turn off garbage collection: the ids form no cycles, and scanning millions of them costs a tenth of the time."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def reason_unfit(sample: EncodedSample, max_length: int) -> tuple[str, str]:
    if sample.size > max_length:
        return "too_long", _("{size} tokens, max_length is {max_length}").format(
            size=sample.size, max_length=max_length
        )
    learned = sum([len(piece.ids) for piece in sample.pieces if piece.learn])
    if learned < 1 or (learned == 1 and sample.pieces[0].learn):
        return "nothing_to_learn", _("this sample has no token to learn")
    return "", ""


def make_batch(samples: list[EncodedSample], chunk: Sequence[Dialogue | Document]) -> Batch:
    pieces = [piece for sample in samples for piece in sample.pieces]
    lengths = [len(piece.ids) for piece in pieces]
    parts = [piece.ids for piece in pieces]
    if all(part.__class__ is np.ndarray for part in parts):
        ids = np.concatenate([np.zeros(0, np.uint32), *parts])
    else:
        ids = np.fromiter(chain.from_iterable(parts), np.uint32, sum(lengths))
    sizes = np.array([sample.size for sample in samples], np.int64)
    ends = np.cumsum(sizes)
    learn = np.repeat(np.array([piece.learn for piece in pieces], bool), lengths)
    learn[(ends - sizes)[sizes > 0]] = False  # the first token has no context, so it cannot be a target
    answer = np.repeat(np.array([piece.answer for piece in pieces], bool), lengths)
    return Batch(
        ids,
        ends,
        spans_of(learn),
        np.array([sample.stop for sample in samples], bool),
        [chunk[sample.dialogue].origin for sample in samples],
        len(chunk),
        int(answer.sum()),
        int((answer & learn).sum()),
    )
