"""Recognise preference data: pairs of a chosen and a rejected answer, and answers with a verdict (KTO).

`prepare.preferences` takes them. As dialogues they are refused by name: fine-tuning would learn the answer that people
disliked as well as the other.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from tongwen.core.errors import DataError, RowRejected
from tongwen.core.i18n import _
from tongwen.data.fields import is_empty
from tongwen.recipe.data import SourceConfig

_ANSWER = "(?:response|answer|output|messages?|text|completion|conversations?)s?"
_PAIR = re.compile(rf"(?:{_ANSWER}_)?((?:non_?|dis)?(?:chosen|rejected|preferred))(?:_{_ANSWER})?", re.IGNORECASE)
_VERDICTS = (
    "label",
    "kto_tag",
    "chosen",
    "liked",
    "desirable",
    "accepted",
    "is_chosen",
    "is_preferred",
    "is_desirable",
)
_DIALOGUES = ("messages", "conversations", "conversation")
_QUESTIONS = ("instruction", "prompt", "question", "query", "input")


def check_preferences(row: dict[str, Any], source: SourceConfig, place: str) -> None:
    """Raise DataError for a row with a chosen and a rejected answer, unless the recipe maps the chosen one, and for an
    answer that is marked as disliked."""
    pairs, verdict_keys = _suspects(tuple(row))
    if not pairs and not verdict_keys:
        return
    mapped = set(source.columns.values())
    found = [
        key for key in pairs if key not in source.ignore and not isinstance(row[key], bool) and not is_empty(row[key])
    ]
    if found and not mapped & set(found):
        raise DataError(
            _("this is preference data ({names}), and not a dialogue").format(names=", ".join(found)),
            place=place,
            remedy=_(
                "to train on both answers: prepare: {{preferences: [FILE]}} and a `prefer` section; {remedy}"
            ).format(remedy=_remedy(row, found)),
        )
    for key in verdict_keys:
        if key not in mapped and key not in source.ignore and _is_bad(key, row):
            raise DataError(
                _("this is preference data ({key}): {value!r} marks an answer that must not be learned").format(
                    key=key, value=row[key]
                ),
                place=place,
                remedy=_(
                    "to train on them: prepare: {{preferences: [FILE]}} and prefer: {{method: kto}}; keep only the rows whose {key} is true; or, if it means something else: {{path: …, ignore: [{key}]}}"
                ).format(key=key),
            )


@lru_cache(maxsize=4096)
def _suspects(keys: tuple[str, ...]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the keys of a pair of answers and those of a verdict. Most rows of a file have the same keys."""
    return tuple(key for key in keys if _PAIR.fullmatch(key)), tuple(key for key in _VERDICTS if key in keys)


def says_true(value: Any) -> bool:
    """Whether a verdict is one, and good: such a row is an ordinary one."""
    return value is True or (isinstance(value, str) and value.strip().lower() == "true")


def find_pair(row: Mapping[str, Any]) -> tuple[str, str]:
    """Return the keys of the chosen and the rejected answer; "" for one that a row does not have.

    Raises RowRejected when several keys mean the same answer.
    """
    keys = [key for key in _suspects(tuple(row))[0] if not isinstance(row[key], bool) and not is_empty(row[key])]
    liked = [key for key in keys if _is_liked(key)]
    disliked = [key for key in keys if key not in liked]
    for same in (liked, disliked):
        if len(same) > 1:
            raise RowRejected("ambiguous", _("{one} and {other} mean the same").format(one=same[0], other=same[1]))
    return liked[0] if liked else "", disliked[0] if disliked else ""


def find_verdict(row: Mapping[str, Any]) -> str:
    """Return the key of a row's verdict on its answer; "" without one. Raises RowRejected for one that is neither."""
    found = [key for key in _suspects(tuple(row))[1] if row[key] is not None]
    if not found:
        return ""
    key = found[0]
    if is_true(row[key]) == _is_false(row[key]):
        raise RowRejected("bad_label", _("{key}: {value!r} is neither true nor false").format(key=key, value=row[key]))
    return key


def is_preference(row: Any) -> bool:
    """Whether a row is a pair or has a verdict."""
    try:
        return isinstance(row, dict) and bool(any(find_pair(row)) or find_verdict(row))
    except RowRejected:
        return False


def is_true(value: Any) -> bool:
    return says_true(value) or (isinstance(value, (int, float)) and value == 1)


def _is_false(value: Any) -> bool:
    said = isinstance(value, str) and value.strip().lower() == "false"
    return value is False or said or (isinstance(value, (int, float)) and value == 0)


def verdicts(row: Mapping[str, Any]) -> list[str]:
    """Return the names of a row's good verdicts. `check_preferences` has refused the bad ones."""
    return [key for key in _suspects(tuple(row))[1] if says_true(row[key])]


def _is_bad(key: str, row: Mapping[str, Any]) -> bool:
    """Whether a row says that its answer is disliked. A `label` says so in the two shapes of KTO alone, and only as true or
    false: beside an instruction, and as a number, it is the class of a classification."""
    value = row[key]
    if key == "label" and not (
        any(name in row for name in _DIALOGUES) or ("prompt" in row and "instruction" not in row)
    ):
        return False
    is_false = value is False or (isinstance(value, str) and value.strip().lower() == "false")
    return is_false or (key != "label" and isinstance(value, (int, float)) and value == 0)


def _remedy(row: dict[str, Any], found: list[str]) -> str:
    """Return what makes an ordinary row of it: the question and the chosen answer."""
    liked = [key for key in found if _is_liked(key)]
    if not liked:
        return _("to learn the row's own answer: {{path: …, ignore: [{names}]}}").format(names=", ".join(found))
    chosen, value = liked[0], row[liked[0]]
    question = next((key for key in _QUESTIONS if not is_empty(row.get(key))), "")
    if isinstance(value, list) and (not question or _begins_with_question(value)):
        settings = f"format: messages, columns: {{messages: {chosen}}}"
    elif question and isinstance(value, list):
        mapped = "" if question == "prompt" else f"prompt: {question}, "
        settings = f"format: completion, columns: {{{mapped}completion: {chosen}}}"
    elif question == "instruction" and isinstance(value, str):
        settings = f"format: alpaca, columns: {{output: {chosen}}}"
    elif question and isinstance(value, str):
        settings = f"format: pair, columns: {{question: {question}, answer: {chosen}}}"
    elif isinstance(value, dict) and (turns := next((key for key in ("messages", "conversations") if key in row), "")):
        return _("to learn only the chosen answers: {command}").format(
            command=f"jq -c '.{turns} += [.{chosen}] | del({', '.join(f'.{key}' for key in found)})' FILE > NEW.jsonl"
        )
    else:
        return _("to learn only the chosen answers, write them as messages: {shape}").format(
            shape='{"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]}'
        )
    return _("to learn only the chosen answers: {{path: …, {settings}}}").format(settings=settings)


def _is_liked(key: str) -> bool:
    found = _PAIR.fullmatch(key)
    return found is not None and found[1].lower() in ("chosen", "preferred")


def _begins_with_question(value: list[Any]) -> bool:
    first = value[0]
    return isinstance(first, dict) and first.get("role", first.get("from")) in ("user", "human", "system")
