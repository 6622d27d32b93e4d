"""Score entities in an answer, one per line as `实体_类型`, by name and type or by their position in the text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from tongwen.core.errors import MissingPackage
from tongwen.core.i18n import _

NONE = "没有"  # the answer when there are no entities


def read_entities(answer: str) -> list[tuple[str, str]]:
    """Return (name, type) of every line, split at its last `_`. A line without `_` gets the name "" and matches nothing."""
    lines = [line.strip() for line in answer.splitlines()]
    parts = [line.rpartition("_") for line in lines if line and line != NONE]
    return [(name.strip(), kind.strip()) for name, _, kind in parts]


def check(wanted: str) -> str:
    """Return the problem of a reference answer, or ""."""
    bad = next((kind for name, kind in read_entities(wanted) if not name or not kind), None)
    if bad is None:
        return ""
    return _("{bad!r} is neither `实体_类型` nor `{none}`").format(bad=bad, none=NONE)


def match(answer: str, wanted: str) -> Sequence[float]:
    """Return the counts (correct, predicted, expected). An entity that occurs twice counts twice."""
    found, expected = Counter(read_entities(answer)), Counter(read_entities(wanted))
    return float((found & expected).total()), float(found.total()), float(expected.total())


def match_spans(question: str, answer: str, wanted: str) -> Sequence[float]:
    """Return the same counts by the entities' positions in the question, as seqeval counts them."""
    try:
        from seqeval.metrics.sequence_labeling import get_entities
    except ImportError:
        raise MissingPackage("seqeval", _("scoring spans"), "evaluate") from None
    found, expected = (set(get_entities(tags)) for tags in tag(question, answer, wanted))
    return float(len(found & expected)), float(len(found)), float(len(expected))


def tag(question: str, *answers: str) -> list[list[str]]:
    """Return each answer as B-/I-/O tags over the question's characters, all of the same length.

    Entities are placed from the last to the first, each at the last free occurrence of its name, because the text follows
    the instruction, which may contain the same words. A name that does not occur gets a tag behind the text, at a position
    that no other answer uses.
    """
    tags, unplaced = [["O"] * len(question) for _ in answers], 0
    for row_tags, answer in zip(tags, answers, strict=True):
        for name, kind in reversed(read_entities(answer)):
            if (start := _last_free(question, name, row_tags)) is None:
                row_tags += ["O"] * (len(question) + unplaced - len(row_tags)) + [f"B-{kind}"]
                unplaced += 1
            else:
                row_tags[start : start + len(name)] = [f"B-{kind}"] + [f"I-{kind}"] * (len(name) - 1)
    longest = max(map(len, tags))
    return [row_tags + ["O"] * (longest - len(row_tags)) for row_tags in tags]


def _last_free(text: str, name: str, tags: list[str]) -> int | None:
    end = len(text)
    while name and (start := text.rfind(name, 0, end)) >= 0:
        if all(label == "O" for label in tags[start : start + len(name)]):
            return start
        end = start + len(name) - 1
    return None


def f1_of(sums: np.ndarray) -> dict[str, float]:
    """Return micro F1, precision and recall from summed (correct, predicted, expected); all are 1 if both sides are empty."""
    right, predicted, expected = map(float, sums)
    if not predicted and not expected:
        return {"f1": 1.0, "precision": 1.0, "recall": 1.0}
    return {
        "f1": 2 * right / (predicted + expected),
        "precision": right / predicted if predicted else 0.0,
        "recall": right / expected if expected else 0.0,
    }
