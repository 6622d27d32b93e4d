"""Find duplicates and contamination: rows that repeat an earlier row, or held-out and evaluation data.

All methods work on characters, so they need no blanks between words. Texts are compared in a folded form (NFKC, lower
case, no blanks and punctuation); the text itself stays unchanged.

* Exact duplicates: equal 128-bit digests of the folded form.
* Near duplicates: MinHash over character 3-grams finds candidates (locality-sensitive hashing in BANDS x ROWS), and each
  candidate is confirmed by the exact Jaccard similarity of the two sets. The first of a cluster stays.
* Contamination: a row that contains most of the character 13-grams of a held-out or evaluation text. 13-grams that many
  of those texts share, such as a common instruction, are ignored.

Memory: one byte per text for its verdict, 25 per text in near deduplication, and the partner of each duplicate; everything
else is on disk and read in blocks.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterable
from functools import lru_cache
from hashlib import blake2b
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from tongwen.core.records import Document, Message, Preference, Record

# 1 - (1 - J^ROWS)^BANDS: 0.97 of the pairs with Jaccard 0.6 become candidates, 0.997 of those with 0.7, half of those
# with 0.4. With 5 % of the characters of a text changed, the similarity is about 0.72.
BANDS, ROWS = 25, 4
GRAM, LONG_GRAM = 3, 13
COVERED = 0.8  # share of a held-out or evaluation text's own 13-grams that makes a row contaminated
MIN_GRAMS = 8  # a text with fewer is compared as a whole only
PARTITION = 500_000  # digests that are compared at once
TRIES = 16  # members of a bucket that a text is compared with
GOLDEN = 0x9E3779B97F4A7C15
_POWERS = {width: np.uint64(pow(GOLDEN, width, 1 << 64)) for width in (1, 2, 4, 8)}
_NOISE = re.compile(r"[\W_]+")


def fold(text: str) -> str:
    """Return the folded text for comparisons: NFKC, lower case, letters and digits only."""
    return _NOISE.sub("", unicodedata.normalize("NFKC", text).lower()) or "".join(text.split())


def text_of(record: Record) -> str:
    """Return the text of a document, or all messages of other records with roles and tool calls. The ids of calls, which
    differ whenever a dialogue is made again, are left out."""
    if isinstance(record, Document):
        return record.text
    if isinstance(record, Preference):
        parts = (record.prompt, record.chosen, record.rejected)
        return "\n".join(
            f"{name}\n{_joined(part)}" for name, part in zip(("prompt", "chosen", "rejected"), parts, strict=True)
        )
    return _joined(record.messages)


def _joined(messages: Iterable[Message]) -> str:
    return "\n".join(f"{message.role}\n{message.content}\n{_calls(message) or ''}" for message in messages)


def _calls(message: Message) -> list[dict[str, Any]]:
    return [{key: value for key, value in call.items() if key != "id"} for call in message.tool_calls]


def digest(folded: str) -> bytes:
    """Return 16 bytes that are equal for equal folded texts."""
    return blake2b(folded.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def grams(folded: str, size: int = GRAM) -> np.ndarray:
    """Return (L - size + 1,) uint64: a well mixed hash of each n-gram of `size` characters of a folded text.

    The polynomial of an n-gram is combined from those of its halves, so 13 characters take 5 products, not 12.
    """
    points = np.frombuffer(folded.encode("utf-32-le", "surrogatepass"), dtype=np.uint32).astype(np.uint64)
    if len(points) < size:
        return np.zeros(0, np.uint64)
    out, have = np.zeros(len(points) + 1, np.uint64), 0  # polynomials of the first `have` characters of each n-gram
    part, width = points, 1
    while have < size:
        if size & width:
            count = len(points) - have - width + 1
            out = out[:count] * _POWERS[width] + part[have : have + count]
            have += width
        part = part[:-width] * _POWERS[width] + part[width:]
        width *= 2
    return mix(out)


def mix(values: np.ndarray) -> np.ndarray:
    """splitmix64's finaliser (Steele, Lea and Flood 2014) on uint64."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(values ^ (values >> np.uint64(31)))


@lru_cache(maxsize=1)
def _permutations() -> tuple[np.ndarray, np.ndarray]:
    """Return (BANDS x ROWS, 1) odd factors and offsets, always the same."""
    values = mix(np.arange(1, 2 * BANDS * ROWS + 1, dtype=np.uint64) * np.uint64(GOLDEN)).astype(np.uint32)
    return values[: BANDS * ROWS, None] | np.uint32(1), values[BANDS * ROWS :, None]


def signature(folded: str) -> np.ndarray:
    """Return (BANDS,) uint64: one hash per band of the text's MinHash; 0 only for texts shorter than a 3-gram."""
    hashes = grams(folded).astype(np.uint32)
    if not len(hashes):
        return np.zeros(BANDS, np.uint64)
    factors, offsets = _permutations()
    least = np.full(BANDS * ROWS, np.iinfo(np.uint32).max, np.uint32)
    for begin in range(0, len(hashes), 1024):  # a table that stays in the cache
        table = hashes[None, begin : begin + 1024] * factors  # (BANDS * ROWS, L)
        table += offsets
        np.minimum(least, table.min(axis=1), out=least)
    bands = np.zeros(BANDS, np.uint64)
    for row in least.reshape(BANDS, ROWS).T:
        bands = mix(bands * np.uint64(0x100000001B3) + row)
    return np.asarray(bands | np.uint64(1))


def jaccard(one: str, other: str) -> float:
    """Return the share of common 3-grams among all 3-grams of two folded texts."""
    first, second = np.unique(grams(one)), np.unique(grams(other))
    shared = len(np.intersect1d(first, second, assume_unique=True))
    return shared / max(1, len(first) + len(second) - shared)


def find_exact(blocks: Callable[[], Iterable[np.ndarray]], count: int) -> tuple[np.ndarray, np.ndarray]:
    """Return (indices of duplicates, index of the first equal text), both (D,) int64, sorted by index.

    blocks(): all `count` digests in order, in pieces (n, 2) uint64; read once for each PARTITION of them.
    """
    parts = max(1, -(-count // PARTITION))
    found = [_find_exact(blocks(), np.uint64(part), np.uint64(parts)) for part in range(parts)]
    same, first = (np.concatenate(column) for column in zip(*found, strict=True))
    order = np.argsort(same)
    return same[order], first[order]


def _find_exact(blocks: Iterable[np.ndarray], part: np.uint64, parts: np.uint64) -> tuple[np.ndarray, np.ndarray]:
    digests, numbers, begin = [np.zeros((0, 2), np.uint64)], [np.zeros(0, np.int64)], 0
    for block in blocks:
        mine = np.flatnonzero(block[:, 0] % parts == part)
        digests.append(block[mine])
        numbers.append(mine + begin)
        begin += len(block)
    keys, index = np.concatenate(digests), np.concatenate(numbers)
    order = np.lexsort((keys[:, 1], keys[:, 0]))
    ranked = keys[order]
    new = np.ones(len(order), bool)
    new[1:] = (ranked[1:] != ranked[:-1]).any(axis=1)
    firsts = order[np.flatnonzero(new)][np.cumsum(new) - 1]  # lexsort is stable: the first of a run is the earliest
    return index[order[~new]], index[firsts[~new]]


def find_near(
    bands: Callable[[int], np.ndarray], excluded: np.ndarray, text: Callable[[int], str], threshold: float
) -> dict[int, int]:
    """Return {index of a text that is not the first of its cluster: a confirmed partner in the cluster}.

    bands(b): (N,) uint64 hashes of band b; text(index): the folded text;
    excluded: (N,) bool, texts to skip (exact duplicates).
    """
    count = len(excluded)
    roots = np.arange(count, dtype=np.int64)
    partners: dict[int, int] = {}
    alike = lru_cache(maxsize=100_000)(lambda one, other: jaccard(text(one), text(other)) >= threshold)
    for band in range(BANDS):
        for bucket in _buckets(np.where(excluded, np.uint64(0), bands(band))):
            tried: list[int] = []
            for index in bucket:
                root = _root(roots, index)
                for other in tried:
                    rival = _root(roots, other)
                    if rival == root:
                        break
                    if alike(other, index):
                        roots[max(root, rival)] = min(root, rival)
                        partners.setdefault(index, other)
                        partners.setdefault(other, index)
                        break
                else:
                    if len(tried) < TRIES:
                        tried.append(index)
    return {int(index): partners[int(index)] for index in np.flatnonzero(roots != np.arange(count))}


def _buckets(hashes: np.ndarray) -> Iterable[list[int]]:
    """Yield groups of two or more indices with the same hash, in order."""
    order = np.argsort(hashes, kind="stable")
    ranked = hashes[order]
    edges = np.flatnonzero(np.concatenate([[True], ranked[1:] != ranked[:-1], [True]]))
    for begin, end in pairwise(edges):
        if end - begin > 1 and ranked[begin]:
            yield order[begin:end].tolist()


def _root(roots: np.ndarray, index: int) -> int:
    while roots[index] != index:
        roots[index] = roots[roots[index]]
        index = int(roots[index])
    return index


class ContaminationIndex:
    """Index of held-out and evaluation texts, which must not be in training data, as sorted 13-grams.

    hashes: (G,) uint64 sorted; owners: (G,) int32, the text of each hash; sizes: (T,) number of 13-grams of each text
    """

    def __init__(self, hashes: np.ndarray, owners: np.ndarray, sizes: np.ndarray, exact: frozenset[bytes]) -> None:
        self.hashes, self.owners, self.sizes, self.exact = hashes, owners, sizes, exact

    @classmethod
    def from_records(cls, records: Iterable[Record]) -> ContaminationIndex:
        """Index the questions of dialogues and the whole text of documents."""
        parts: list[np.ndarray] = []
        exact = set()
        for record in records:
            exact.add(digest(fold(text_of(record))))
            parts.append(np.unique(grams(fold(_question_of(record)), LONG_GRAM)))
        hashes = np.concatenate(parts) if parts else np.zeros(0, np.uint64)
        owners = np.repeat(np.arange(len(parts), dtype=np.int32), [len(part) for part in parts])
        order = np.argsort(hashes, kind="stable")
        hashes, owners = hashes[order], owners[order]
        if len(hashes):
            _, counts = np.unique(hashes, return_counts=True)
            rare = np.repeat(counts <= max(2, len(parts) // 100), counts)
            hashes, owners = hashes[rare], owners[rare]
        return cls(hashes, owners, np.bincount(owners, minlength=len(parts)), frozenset(exact))

    def save(self, file: Path) -> None:
        exact = np.frombuffer(b"".join(sorted(self.exact)), np.uint8)
        with file.open("wb") as stream:
            np.savez(stream, hashes=self.hashes, owners=self.owners, sizes=self.sizes, exact=exact)

    @classmethod
    def load(cls, file: Path) -> ContaminationIndex:
        with np.load(file, allow_pickle=False) as found:
            exact = found["exact"].tobytes()
            parts = frozenset(exact[place : place + 16] for place in range(0, len(exact), 16))
            return cls(found["hashes"], found["owners"], found["sizes"], parts)

    def match(self, record: Record, own_digest: bytes) -> str:
        """Return `same` when the record equals a text of the index, `covers` when it contains one, else ""."""
        if own_digest in self.exact:
            return "same"
        folded = fold(_question_of(record))
        if not len(self.hashes) or len(folded) < LONG_GRAM - 1 + COVERED * MIN_GRAMS:
            return ""
        asked = grams(folded, LONG_GRAM)
        left = np.searchsorted(self.hashes, asked)
        known = self.hashes[np.minimum(left, len(self.hashes) - 1)] == asked
        if not known.any():
            return ""
        asked, first = np.unique(asked[known], return_index=True)
        left = left[known][first]
        right = np.searchsorted(self.hashes, asked, side="right")
        hits = [self.owners[begin:end] for begin, end in zip(left, right, strict=True)]
        owners, counts = np.unique(np.concatenate(hits), return_counts=True)
        return "covers" if bool(np.any(counts >= COVERED * np.maximum(MIN_GRAMS, self.sizes[owners]))) else ""


def _question_of(record: Record) -> str:
    if isinstance(record, Document):
        return record.text
    messages = record.prompt if isinstance(record, Preference) else record.messages
    return "\n".join(message.content for message in messages if message.role in ("user", "tool"))
