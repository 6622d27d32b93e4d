"""Encoded samples end to end, in memory or on disk; training reads them memory-mapped.

A store on disk is written batch by batch. After each batch the files are synced to disk, and a line of the journal records
their valid lengths, so that an interrupted encoding continues from that batch. The complete folder is renamed at the end.

    ids.bin      uint16 or uint32, all tokens
    ends.bin     int64, the end of each sample
    spans.bin    int64 pairs, the learned ranges
    samples.bin  SAMPLE, one per sample
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from tongwen.core import artifact
from tongwen.core.records import Origin
from tongwen.data.ledger import Ledger

FORMAT = 2  # part of the key of every cache: raise it when the same input gives other tokens
SAMPLE = np.dtype([("file", "<u4"), ("row", "<i8"), ("stop", "?")])
FILES = ("ids.bin", "ends.bin", "spans.bin", "samples.bin", "rejected.jsonl")


@dataclass(frozen=True)
class Batch:
    """Some samples, end to end, counted from 0.

    ids: (N,) uint32; ends: (S,) int64; spans: (P, 2) int64 of learned positions; stops: (S,) bool;
    rows: number of source rows; answers, learned_answers: tokens of assistants' answers, and the learned ones of them
    """

    ids: np.ndarray
    ends: np.ndarray
    spans: np.ndarray
    stops: np.ndarray
    origins: list[Origin]
    rows: int
    answers: int
    learned_answers: int


@dataclass(frozen=True)
class TokenStore:
    """All samples.

    ids:     (N,) uint16 or uint32
    offsets: (S + 1,) int64, the begin of each sample
    spans:   (P, 2) int64, ranges of tokens that are targets of the loss (never the first token of a sample)
    samples: (S,) SAMPLE: file (an index of `files`) and row of its source, and whether it contains a learned stop token
    roles:   tokens of assistants' answers, and the learned ones of them
    """

    ids: np.ndarray
    offsets: np.ndarray
    spans: np.ndarray
    samples: np.ndarray
    files: tuple[str, ...]
    roles: tuple[int, int] = (0, 0)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> np.ndarray:
        """Return (S,) tokens per sample."""
        return np.diff(self.offsets)

    @property
    def longest(self) -> int:
        """Return the tokens of the longest sample."""
        return int(self.lengths.max())

    @property
    def stops(self) -> np.ndarray:
        return np.asarray(self.samples["stop"])

    @property
    def learned_tokens(self) -> int:
        return int((self.spans[:, 1] - self.spans[:, 0]).sum())

    def sample(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Return (ids, learn) of one sample."""
        begin, end = self.offsets[index], self.offsets[index + 1]
        learn = np.zeros(end - begin, bool)
        first, last = np.searchsorted(self.spans[:, 0], (begin, end))
        for start, stop in self.spans[first:last] - begin:
            learn[start:stop] = True
        return self.ids[begin:end], learn

    def take(self, indices: Iterable[int]) -> list[tuple[np.ndarray, np.ndarray]]:
        """Return (ids, learn) of some samples."""
        return [self.sample(index) for index in indices]

    def origin(self, index: int) -> Origin:
        sample = self.samples[index]
        return Origin(self.files[sample["file"]], int(sample["row"]))


def subset(store: TokenStore, indices: Sequence[int]) -> TokenStore:
    """Return some samples as a store in memory."""
    samples = store.take(indices)
    ids = np.concatenate([np.zeros(0, np.uint32), *(ids for ids, _ in samples)])
    learn = np.concatenate([np.zeros(0, bool), *(learn for _, learn in samples)])
    ends = np.cumsum([0, *(len(ids) for ids, _ in samples)])
    return TokenStore(ids, ends, spans_of(learn), store.samples[list(indices)], store.files)


def spans_of(learn: np.ndarray) -> np.ndarray:
    """Return (P, 2) int64: begin and end of each run of True in (N,) bool."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], learn, [False]]).astype(np.int8)))
    return edges.reshape(-1, 2).astype(np.int64)


def in_memory(batches: Iterable[Batch]) -> TokenStore:
    """Return a store in memory."""
    files: dict[str, int] = {}
    ids, ends, spans, samples = [], [], [], []
    total, answers, learned_answers = 0, 0, 0
    for batch in batches:
        ids.append(batch.ids)
        ends.append(batch.ends + total)
        spans.append(batch.spans + total)
        samples.append(_samples(batch, files))
        total += len(batch.ids)
        answers, learned_answers = answers + batch.answers, learned_answers + batch.learned_answers
    return TokenStore(
        np.concatenate([np.zeros(0, np.uint32), *ids]),
        np.concatenate([np.zeros(1, np.int64), *ends]),
        np.concatenate([np.zeros((0, 2), np.int64), *spans]),
        np.concatenate([np.zeros(0, SAMPLE), *samples]),
        tuple(files),
        (answers, learned_answers),
    )


def _samples(batch: Batch, files: dict[str, int]) -> np.ndarray:
    out = np.zeros(len(batch.ends), SAMPLE)
    out["file"] = [files.setdefault(origin.file, len(files)) for origin in batch.origins]
    out["row"] = [origin.row for origin in batch.origins]
    out["stop"] = batch.stops
    return out


class Writer:
    """Write a store into `FOLDER.partial` and rename it when it is complete.

    rows: source rows that an interrupted writer has already encoded; ledger: its counts.
    """

    def __init__(self, folder: Path, vocabulary: int) -> None:
        self.folder, self.working = folder, artifact.partial_of(folder)
        self.dtype = np.dtype(np.uint16 if vocabulary <= 1 << 16 else np.uint32)
        self.working.mkdir(parents=True, exist_ok=True)
        self.state = _last(self.working / "journal.jsonl") or {
            "rows": 0,
            "bytes": [0] * len(FILES),
            "files": [],
            "roles": [0, 0],
            "ledger": Ledger("rows", "tokens").to_dict(),
        }
        self.streams: list[BinaryIO] = []
        for name, size in zip(FILES, self.state["bytes"], strict=True):
            stream = (self.working / name).open("ab")
            stream.truncate(size)
            self.streams.append(stream)
        self.journal = (self.working / "journal.jsonl").open("ab")
        self.files = {name: place for place, name in enumerate(self.state["files"])}
        self.tokens = self.state["bytes"][0] // self.dtype.itemsize

    @property
    def rows(self) -> int:
        return int(self.state["rows"])

    @property
    def ledger(self) -> Ledger:
        return Ledger.from_dict(self.state["ledger"])

    def add(self, batch: Batch, ledger: Ledger, rejected: Sequence[bytes]) -> None:
        """Append a batch durably: it survives a crash. ledger: the counts up to and including this batch."""
        parts = (
            batch.ids.astype(self.dtype),
            batch.ends + self.tokens,
            batch.spans + self.tokens,
            _samples(batch, self.files),
        )
        for stream, part in zip(self.streams, [*(part.tobytes() for part in parts), b"".join(rejected)], strict=True):
            stream.write(part)
            stream.flush()
            os.fsync(stream.fileno())
        self.tokens += len(batch.ids)
        roles = self.state["roles"]
        self.state = {
            "rows": self.rows + batch.rows,
            "bytes": [stream.tell() for stream in self.streams],
            "files": list(self.files),
            "roles": [roles[0] + batch.answers, roles[1] + batch.learned_answers],
            "ledger": ledger.to_dict(),
        }
        self.journal.write(json.dumps(self.state, ensure_ascii=False).encode() + b"\n")
        self.journal.flush()
        os.fsync(self.journal.fileno())

    def close(self) -> None:
        """Write store.json with all hashes and rename the complete folder."""
        for stream in (*self.streams, self.journal):
            stream.close()
        hashes = [artifact.hash_file(self.working / name) for name in FILES]
        artifact.write_json(self.working / "store.json", {**self.state, "dtype": self.dtype.name, "sha256": hashes})
        (self.working / "journal.jsonl").unlink()
        self.working.replace(self.folder)
        artifact.sync_folder(self.folder.parent)


def _last(journal: Path) -> dict[str, Any] | None:
    """Return the last whole line of a journal, or None."""
    if not journal.is_file():
        return None
    for line in reversed(journal.read_bytes().split(b"\n")):
        try:
            return dict(json.loads(line))
        except ValueError:
            continue
    return None


def open_store(folder: Path) -> tuple[TokenStore, Ledger] | None:
    """Open a complete store, memory-mapped, with its ledger; None when it is missing or its files have changed."""
    file = folder / "store.json"
    try:
        facts = json.loads(file.read_text(encoding="utf-8"))
        if [artifact.hash_file(folder / name) for name in FILES] != facts["sha256"]:
            return None
    except (OSError, ValueError, KeyError, TypeError):
        return None
    ids = _map(folder / "ids.bin", np.dtype(facts["dtype"]))
    ends = np.fromfile(folder / "ends.bin", np.int64)
    store = TokenStore(
        ids,
        np.concatenate([np.zeros(1, np.int64), ends]),
        _map(folder / "spans.bin", np.dtype(np.int64)).reshape(-1, 2),
        _map(folder / "samples.bin", SAMPLE),
        tuple(facts["files"]),
        tuple(facts["roles"]),
    )
    return store, Ledger.from_dict(facts["ledger"])


def _map(file: Path, dtype: np.dtype[Any]) -> np.ndarray:
    if not file.stat().st_size:
        return np.zeros(0, dtype)
    return np.memmap(file, dtype, mode="r")


def read_rejected(folder: Path) -> Iterator[dict[str, Any]]:
    with (folder / "rejected.jsonl").open("rb") as stream:
        yield from map(json.loads, stream)
