"""Continue a base tokenizer's byte-pair encoding: learn the merges to append, most frequent pair first.

The corpus is one flat, doubly linked list of base tokens, with each distinct word once and its count. A merge changes
only the occurrences of its pair, found by an index of pairs, in a few numpy operations. So the cost grows with the
number of occurrences, not with merges times corpus. The greedy choice is that of Sennrich et al. 2016
(arXiv:1508.07909), but starts from the base's tokens instead of characters.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np

END = -1  # no neighbour


@dataclass
class LearnedMerges:
    """The result of learning.

    merges: (left id, right id, resulting id), most frequent first; a result that exists already needs no new row
    pieces: the bytes of each new id; pieces[k] belongs to `first_new + k`
    counts: each pair's count in the corpus when it was chosen
    """

    first_new: int
    merges: list[tuple[int, int, int]] = field(default_factory=list)
    pieces: list[bytes] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)

    def first(self, pieces: int) -> LearnedMerges:
        """Return the result of learning only this number of pieces."""
        size = self.first_new + pieces
        kept = next((place for place, merge in enumerate(self.merges) if merge[2] >= size), len(self.merges))
        return LearnedMerges(self.first_new, self.merges[:kept], self.pieces[:pieces], self.counts[:kept])


class WordCounts:
    """Words as one linked list of tokens, at 24 bytes per token."""

    def __init__(self, words: Mapping[tuple[int, ...], int]) -> None:
        lengths = np.fromiter((len(word) for word in words), np.int64, len(words))
        total = int(lengths.sum())
        self.token = np.fromiter((token for word in words for token in word), np.int32, total)
        self.weight = np.repeat(np.fromiter(words.values(), np.int64, len(words)), lengths)
        ends = np.cumsum(lengths)
        place = np.arange(total, dtype=np.int32)
        self.after, self.before = place + 1, place - 1
        self.after[ends - 1] = END
        self.before[(ends - lengths)[lengths > 0]] = END

    def pairs_at(self, places: np.ndarray) -> np.ndarray:
        """Return (left id << 32 | right id) of the pair that begins at each place."""
        pairs: np.ndarray = self.token[places].astype(np.int64) << 32 | self.token[self.after[places]]
        return pairs


def learn_merges(
    words: Mapping[tuple[int, ...], int],
    token_bytes: list[bytes],
    allows: Callable[[bytes], bool],
    pieces: int,
    *,
    first_new: int,
    min_count: int = 2,
    forbidden: Iterable[bytes] = (),
    progress: Callable[[int], None] = lambda done: None,
) -> LearnedMerges:
    """Learn merges for at most `pieces` new tokens from words (base tokens -> count).

    token_bytes: the bytes of every base token by id
    allows:    whether bytes may become a piece
    first_new: the id of the first new piece
    forbidden: bytes that must not become a piece: those of special tokens
    progress:  called now and then with the number of new tokens
    Ends early when no allowed pair occurs `min_count` times.
    """
    learner = _Learner(WordCounts(words), token_bytes, allows, first_new, min_count, set(forbidden))
    while len(learner.out.pieces) < pieces and (best := learner.best()) is not None:
        learner.merge(*best)
        if len(learner.out.merges) % 100 == 0:
            progress(len(learner.out.pieces))
    return learner.out


class _Learner:
    def __init__(
        self,
        corpus: WordCounts,
        token_bytes: list[bytes],
        allows: Callable[[bytes], bool],
        first_new: int,
        min_count: int,
        forbidden: set[bytes],
    ) -> None:
        self.corpus, self.allows, self.min_count, self.forbidden = corpus, allows, min_count, forbidden
        self.token_bytes = dict(enumerate(token_bytes))
        self.id_of = {piece: index for index, piece in reversed(self.token_bytes.items())}
        self.out = LearnedMerges(first_new)
        self.count: dict[int, int] = {}
        self.places: dict[int, list[np.ndarray]] = {}
        self.allowed: dict[int, bool] = {}
        self.queue: list[tuple[int, bool, int]] = []
        self._add(np.flatnonzero(corpus.after != END).astype(np.int32))

    def best(self) -> tuple[int, int] | None:
        """Return the most frequent pair; among equals one that completes a character, then the one with lower ids."""
        while self.queue:
            minus, partial, pair = heapq.heappop(self.queue)
            count = self.count.get(pair, 0)
            if count == -minus:
                return pair, count
            if count >= self.min_count:
                heapq.heappush(self.queue, (-count, partial, pair))
        return None

    def merge(self, pair: int, count: int) -> None:
        """Replace the pair by one token wherever it occurs."""
        left, right = pair >> 32, pair & 0xFFFFFFFF
        made = self._id_of(self.token_bytes[left] + self.token_bytes[right])
        corpus, at = self.corpus, self._occurrences(pair, left, right)
        second = corpus.after[at]
        self._remove(at, second)
        beyond = corpus.after[second]
        corpus.token[at], corpus.token[second] = made, END
        corpus.after[at] = beyond
        corpus.before[beyond[beyond != END]] = at[beyond != END]
        before = corpus.before[at]
        self._add(np.unique(np.concatenate([before[before != END], at[corpus.after[at] != END]])))
        self.out.merges.append((left, right, made))
        self.out.counts.append(count)

    def _id_of(self, piece: bytes) -> int:
        """Return the id of a piece, adding it if it is new."""
        if piece not in self.id_of:
            self.id_of[piece] = new = self.out.first_new + len(self.out.pieces)
            self.token_bytes[new] = piece
            self.out.pieces.append(piece)
        return self.id_of[piece]

    def _occurrences(self, pair: int, left: int, right: int) -> np.ndarray:
        """Return the current places of the pair, without overlaps."""
        corpus = self.corpus
        at = np.unique(np.concatenate(self.places.pop(pair)))
        at = at[(corpus.token[at] == left) & (corpus.after[at] != END)]
        at = at[corpus.token[corpus.after[at]] == right]
        if left == right:  # in a run of equal tokens every second place, from the left
            kept, last = [], END
            for place in at.tolist():
                if place != last:
                    kept.append(place)
                    last = int(corpus.after[place])
                else:
                    last = END
            at = np.array(kept, np.int32)
        return at

    def _remove(self, at: np.ndarray, second: np.ndarray) -> None:
        """Subtract the pairs at, before and after these places from the counts."""
        corpus = self.corpus
        before = corpus.before[at]
        places = np.unique(np.concatenate([before[before != END], at, second[corpus.after[second] != END]]))
        for pair, change, _ in self._grouped(places):
            left = self.count.get(pair, 0) - change
            if left > 0:
                self.count[pair] = left
            else:
                self.count.pop(pair, None)

    def _add(self, places: np.ndarray) -> None:
        """Count the pairs that begin at these places, index their places, and queue those that may be merged."""
        for pair, change, where in self._grouped(places):
            if not self._is_allowed(pair):
                continue
            count = self.count[pair] = self.count.get(pair, 0) + change
            self.places.setdefault(pair, []).append(where)
            if count >= self.min_count:
                heapq.heappush(self.queue, (-count, self._is_partial(pair), pair))

    def _grouped(self, places: np.ndarray) -> Iterable[tuple[int, int, np.ndarray]]:
        """Yield (pair, its count, its places) for the pairs that begin at these places."""
        if not len(places):
            return
        pairs = self.corpus.pairs_at(places)
        order = np.argsort(pairs, kind="stable")
        pairs, places = pairs[order], places[order]
        starts = np.flatnonzero(np.concatenate([[True], pairs[1:] != pairs[:-1]]))
        weights = np.add.reduceat(self.corpus.weight[places], starts)
        ends = [*starts[1:].tolist(), len(pairs)]
        for pair, weight, start, end in zip(
            pairs[starts].tolist(), weights.tolist(), starts.tolist(), ends, strict=True
        ):
            yield pair, weight, places[start:end]

    def _is_allowed(self, pair: int) -> bool:
        known = self.allowed.get(pair)
        if known is None:
            piece = self.token_bytes[pair >> 32] + self.token_bytes[pair & 0xFFFFFFFF]
            known = self.allowed[pair] = piece not in self.forbidden and self.allows(piece)
        return known

    def _is_partial(self, pair: int) -> bool:
        try:
            (self.token_bytes[pair >> 32] + self.token_bytes[pair & 0xFFFFFFFF]).decode("utf-8")
        except UnicodeDecodeError:
            return True
        return False
