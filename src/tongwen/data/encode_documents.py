"""Encode plain text: whole documents, split evenly, or cut into blocks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np

from tongwen.core.records import Document
from tongwen.data.encoded_samples import EncodedSample, make_batch, without_gc
from tongwen.data.encoder import Encoder, Ids, Piece
from tongwen.data.ledger import Ledger
from tongwen.data.token_store import Batch


def encode_documents(
    documents: Iterable[Document],
    encoder: Encoder,
    end: int,
    max_length: int,
    ledger: Ledger,
    window_bytes: int = 1 << 22,
    arrangement: str = "apart",
) -> Iterator[Batch]:
    """Yield samples of plain text, all learned: the tokenizer's prefix, the text, the end-of-text token, each once.
    Batches of about window_bytes limit the memory.

    apart:        a document longer than max_length becomes several samples of about the same length
    concatenated: the documents of a batch end to end, split in the same way; no token is lost
    blocks:       the same, split at every max_length-th token; the rest of a batch is dropped, and counted
    """
    stream = iter(documents)
    while True:
        with without_gc():
            chunk = list(_window(stream, window_bytes))
            if not chunk:
                return
            texts = [
                _with_ends(ids, encoder, end) for ids in encoder.encode_texts([document.text for document in chunk])
            ]
            sizes = [len(ids) for ids in texts]
            ledger.enter(sum(sizes), items=len(texts))
            samples = (
                _one_by_one(texts, max_length)
                if arrangement == "apart"
                else _concatenated(texts, max_length, arrangement)
            )
            kept = sum(sample.size for sample in samples)
            # The end of a batch is dropped; a document is lost when all its tokens are.
            lost = sum(begin >= kept for begin in np.cumsum([0, *sizes[:-1]])) if arrangement == "blocks" else 0
            ledger.keep(kept, items=len(texts) - int(lost))
            if sum(sizes) > kept:
                ledger.lose("block_remainder", sum(sizes) - kept, items=int(lost))
            batch = make_batch(samples, chunk)
        yield batch


def _with_ends(ids: Ids, encoder: Encoder, end: int) -> np.ndarray:
    """Return a document's ids with prefix and end token, each once, also if the text already contains them."""
    pieces = encoder.with_prefix([Piece(ids, learn=True)]) if encoder.prefix else [Piece(ids, learn=True)]
    whole = np.concatenate([np.asarray(piece.ids, np.uint32) for piece in pieces])
    return whole if len(whole) > 1 and whole[-1] == end else np.append(whole, np.uint32(end))


def _one_by_one(texts: list[np.ndarray], max_length: int) -> list[EncodedSample]:
    return [
        EncodedSample(number, [Piece(part, learn=True)], last, len(part))
        for number, ids in enumerate(texts)
        for part, last in _split_evenly(ids, max_length)
    ]


def _split_evenly(ids: np.ndarray, max_length: int) -> Iterator[tuple[np.ndarray, bool]]:
    """Yield (piece, whether it is the last): as few pieces as possible, of about equal length. A last piece of one token
    would have no context to predict it from."""
    parts = np.array_split(ids, -(-len(ids) // max_length))
    yield from zip(parts, [False] * (len(parts) - 1) + [True], strict=True)


def _concatenated(texts: list[np.ndarray], max_length: int, arrangement: str) -> list[EncodedSample]:
    """Return samples across documents. Each belongs to the document in which it begins; `stop` if a document ends in it."""
    flow, ends = np.concatenate(texts), np.cumsum([len(ids) for ids in texts])
    if arrangement == "blocks":
        parts = [flow[begin : begin + max_length] for begin in range(0, len(flow) - max_length + 1, max_length)]
    else:
        parts = [part for part, _ in _split_evenly(flow, max_length)]
    borders = np.cumsum([0, *[len(part) for part in parts]])
    firsts = np.searchsorted(ends, borders[:-1], side="right")
    ended = np.searchsorted(ends, borders, side="right")
    return [
        EncodedSample(int(first), [Piece(part, learn=True)], bool(after > before), len(part))
        for part, first, before, after in zip(parts, firsts, ended[:-1], ended[1:], strict=True)
    ]


def _window(stream: Iterator[Document], size: int) -> Iterator[Document]:
    while size > 0 and (document := next(stream, None)) is not None:
        size -= len(document.text.encode("utf-8", "surrogatepass"))
        yield document
