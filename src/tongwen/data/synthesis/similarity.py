"""Compare a new question with the kept ones: BM25 on a growing index.

BM25 finds texts that share rare words; the longest common subsequence (ROUGE-L) then decides whether they are the same
sentence.
"""

from __future__ import annotations

import heapq
import itertools
import math
import re
from collections import Counter, defaultdict

K1, B = 1.5, 0.75  # Okapi's usual values
_TERM = re.compile(r"[a-z0-9_]+|[^\W_a-z0-9]", re.IGNORECASE)


class SimilarityIndex:
    """An inverted index of texts by their terms."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.lengths: list[int] = []
        self.places: defaultdict[str, list[tuple[int, int]]] = defaultdict(
            list
        )  # term -> (index of the text, frequency)

    def add(self, text: str) -> None:
        found = terms(text)
        for term, times in Counter(found).items():
            self.places[term].append((len(self.texts), times))
        self.texts.append(text)
        self.lengths.append(len(found))

    def nearest(self, text: str, count: int = 10) -> list[tuple[float, str]]:
        """Return (BM25 score, text) of the most similar texts."""
        mean = sum(self.lengths) / max(len(self.lengths), 1)
        scores: defaultdict[int, float] = defaultdict(float)
        for term in set(terms(text)):
            places = self.places.get(term, [])
            weight = math.log(1 + (len(self.texts) - len(places) + 0.5) / (len(places) + 0.5))
            for number, times in places:
                length = 1 - B + B * self.lengths[number] / mean
                scores[number] += weight * times * (K1 + 1) / (times + K1 * length)
        return [
            (score, self.texts[number]) for number, score in heapq.nlargest(count, scores.items(), key=lambda x: x[1])
        ]


def terms(text: str) -> list[str]:
    """Split a text into words of ASCII letters and pairs of adjacent other characters."""
    found = _TERM.findall(text.lower())
    pairs = [a + b for a, b in itertools.pairwise(found) if not a.isascii() and not b.isascii()]
    return [term for term in found if term.isascii()] + (pairs or [term for term in found if not term.isascii()])


def rouge_l(one: str, other: str) -> float:
    """Return the F1 of the longest common subsequence of characters."""
    row = [0] * (len(other) + 1)
    for character in one:
        before = 0
        for place, against in enumerate(other, 1):
            before, row[place] = row[place], before + 1 if character == against else max(row[place], row[place - 1])
    return 2 * row[-1] / max(len(one) + len(other), 1)
