"""Entities in an answer, one a line, `实体_类型`: how many were found, by name and type or by where they stand in the text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from tongwen.core.errors import MissingPackage
from tongwen.core.i18n import _

NONE = "没有"  # what an answer says that found nothing


def read_entities(answer: str) -> list[tuple[str, str]]:
    """(name, type) of every line, cut at its last `_`. A line without one is an entity that nothing equals: name ""."""
    lines = [line.strip() for line in answer.splitlines()]
    parts = [line.rpartition("_") for line in lines if line and line != NONE]
    return [(name.strip(), kind.strip()) for name, _, kind in parts]


def check(wanted: str) -> str:
    """What is wrong with an answer of the data, or ""."""
    bad = next((kind for name, kind in read_entities(wanted) if not name or not kind), None)
    if bad is None:
        return ""
    return _("{bad!r} is neither `实体_类型` nor `{none}`").format(bad=bad, none=NONE)


def match(answer: str, wanted: str) -> Sequence[float]:
    """(right, said, wanted): an entity that stands twice counts twice."""
    found, expected = Counter(read_entities(answer)), Counter(read_entities(wanted))
    return float((found & expected).total()), float(found.total()), float(expected.total())


def match_spans(question: str, answer: str, wanted: str) -> Sequence[float]:
    """The same by where the entities stand in the question, as seqeval counts them."""
    try:
        from seqeval.metrics.sequence_labeling import get_entities
    except ImportError:
        raise MissingPackage("seqeval", _("scoring spans"), "evaluate") from None
    found, expected = (set(get_entities(tags)) for tags in tag(question, answer, wanted))
    return float(len(found & expected)), float(len(found)), float(len(expected))


def tag(question: str, *answers: str) -> list[list[str]]:
    """Each answer as B-/I-/O tags over the question's characters, all equally long.

    The last entity stands where its name last occurs, those before it in what is free to the left: what is searched comes
    after the instruction, which may hold the same words. A name that stands nowhere gets a place behind the text that no
    other answer has.
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
    """Micro F1, precision and recall from summed (right, said, wanted). Nothing said where nothing is wanted is all right."""
    right, predicted, expected = map(float, sums)
    if not predicted and not expected:
        return {"f1": 1.0, "precision": 1.0, "recall": 1.0}
    return {
        "f1": 2 * right / (predicted + expected),
        "precision": right / predicted if predicted else 0.0,
        "recall": right / expected if expected else 0.0,
    }
