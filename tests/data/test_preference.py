"""Preference data are refused by name, and each remedy, done as told, gives the question and the chosen answer."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from tests.data.rows import ASK, PAIRS, PLAIN, REPLY, as_dialogue, role_and_text
from tongwen.core.errors import DataError


def settings_of(remedy: str) -> dict[str, Any]:
    """The line of a recipe that a remedy ends with."""
    settings: dict[str, Any] = yaml.safe_load(remedy[remedy.index("{path:") :])
    return {key: value for key, value in settings.items() if key != "path"}


@pytest.mark.parametrize("row", PAIRS)
@pytest.mark.parametrize("format_", [None, "messages"])
def test_suggested_remedy_learns_the_chosen_answer(row: dict[str, Any], format_: str | None) -> None:
    with pytest.raises(DataError, match="this is preference data") as caught:
        as_dialogue(row, format=format_)
    found = as_dialogue(row, **settings_of(caught.value.remedy))
    assert role_and_text(found) == PLAIN
    assert not any("rejected" in message.content.lower() for message in found.messages)


@pytest.mark.parametrize("value", [False, "false", "False", 0])
@pytest.mark.parametrize("key", ["label", "kto_tag", "liked", "chosen"])
@pytest.mark.parametrize(
    "row",
    [{"messages": [ASK, REPLY]}, {"prompt": "QUESTION", "completion": "ANSWER"}, {"instruction": "QUESTION", "output": "ANSWER"}],
)  # fmt: skip
def test_bad_label_is_refused_and_good_label_is_learned(row: dict[str, Any], key: str, value: Any) -> None:
    if key == "chosen" and not isinstance(value, bool):
        pytest.skip("a text or a number there is no verdict")
    if key == "label" and ((value == 0 and value is not False) or "instruction" in row):
        pytest.skip("the class of a classification")
    with pytest.raises(DataError, match=rf"preference data \({key}\)") as caught:
        as_dialogue({**row, key: value})
    assert role_and_text(as_dialogue({**row, key: value}, **settings_of(caught.value.remedy))) == PLAIN
    good = as_dialogue({**row, key: True})
    assert (role_and_text(good), good.unread) == (PLAIN, ())


@pytest.mark.parametrize(
    "row",
    [
        {"instruction": "QUESTION", "output": "ANSWER", "label": 0},
        {"instruction": "QUESTION", "output": "ANSWER", "label": 1},
        {"instruction": "QUESTION", "output": "ANSWER", "label": False},
        {"messages": [ASK, REPLY], "label": 0},
        {"prompt": "QUESTION", "completion": "ANSWER", "label": 0},
    ],
)
def test_class_is_no_verdict(row: dict[str, Any]) -> None:
    found = as_dialogue(row)
    assert (role_and_text(found), found.unread) == (PLAIN, ("label",))


def test_similar_column_names_are_unread() -> None:
    row = {"messages": [ASK, REPLY], "preferred_language": "zh", "label": "news", "chosen": None, "rejected": ""}
    assert as_dialogue(row).unread == ("preferred_language", "label")
