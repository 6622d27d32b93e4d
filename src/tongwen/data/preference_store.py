"""Preference data as tokens: pairs of a chosen and a rejected sample, or single samples with a label."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from tongwen.core.records import Origin
from tongwen.data.token_store import TokenStore, subset


@dataclass(frozen=True)
class PreferenceStore:
    """Items of preference data over the samples of a store.

    answers: (N,) the sample of each item: the chosen one of a pair
    rejected: (N,) the rejected one; empty for single answers
    labels: (N,) bool, whether the answer is one to prefer; all true for pairs
    """

    store: TokenStore
    answers: np.ndarray
    rejected: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.answers)

    @property
    def is_paired(self) -> bool:
        return len(self.rejected) == len(self.answers)

    @property
    def ids(self) -> np.ndarray:
        return self.store.ids

    @property
    def files(self) -> tuple[str, ...]:
        return self.store.files

    @property
    def samples(self) -> np.ndarray:
        """Return (N,) where each item comes from."""
        return np.asarray(self.store.samples[self.answers])

    @property
    def lengths(self) -> np.ndarray:
        """Return (N,) tokens of each item: of both answers of a pair, each with the prompt."""
        lengths = self.store.lengths
        return np.asarray(lengths[self.answers] + (lengths[self.rejected] if self.is_paired else 0))

    @property
    def longest(self) -> int:
        """Return the tokens of the longest sample."""
        return self.store.longest

    def sample(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Return (ids, learn) of an item's answer: the chosen one of a pair."""
        return self.store.sample(int(self.answers[index]))

    def take(self, indices: Iterable[int]) -> list[tuple[np.ndarray, np.ndarray]]:
        """Return (ids, learn) of the answers of some items, then of their rejected ones."""
        items = list(indices)
        sides = (self.answers, self.rejected) if self.is_paired else (self.answers,)
        return self.store.take([int(side[item]) for side in sides for item in items])

    def origin(self, index: int) -> Origin:
        return self.store.origin(int(self.answers[index]))

    @property
    def answer_lengths(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the learned tokens of each (preferred, other) answer."""
        learned = np.array([np.count_nonzero(learn) for _, learn in self.store.take(range(len(self.store)))], np.int64)
        if self.is_paired:
            return learned[self.answers], learned[self.rejected]
        return learned[self.answers[self.labels]], learned[self.answers[~self.labels]]

    def preferred(self) -> TokenStore:
        """Return the answers to prefer."""
        return subset(self.store, self.answers[self.labels].tolist())


Samples: TypeAlias = TokenStore | PreferenceStore
"""What training draws from."""


def arrange(store: TokenStore, labels: Mapping[Origin, bool] | None) -> PreferenceStore:
    """Return the samples of `encode_preferences` as items.

    labels: by origin, of the answers without a partner; None: keep pairs together, else each answer is an item
    """
    count = len(store)
    if labels is None:
        first = np.arange(0, count, 2)
        return PreferenceStore(store, first, first + 1, np.ones(len(first), bool))
    places = store.samples[["file", "row"]]
    same = np.concatenate([places[1:] == places[:-1], [False]]) if count else np.zeros(0, bool)
    is_second = np.concatenate([[False], same[:-1]]) if count else same
    good = [
        bool(same[index]) if same[index] or is_second[index] else labels[store.origin(index)] for index in range(count)
    ]
    return PreferenceStore(store, np.arange(count), np.zeros(0, np.int64), np.array(good, bool))
