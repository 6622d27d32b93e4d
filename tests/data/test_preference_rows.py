"""Preference data of every kind become one record: the prompt, the chosen and the rejected answer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.data.rows import ASK, BAD, PAIRS, REPLY
from tongwen.core.errors import DataError, RowRejected
from tongwen.core.records import Preference, from_dict
from tongwen.data.clean import Cleaner, RejectedText
from tongwen.data.dataset_info import entry_source
from tongwen.data.preference_rows import read_preference
from tongwen.data.row import RawRow
from tongwen.recipe.data import Clean, SourceConfig

SHAREGPT = {"from": "gpt", "value": "ANSWER"}, {"from": "gpt", "value": "REJECTED"}
MORE = [
    # LLaMA-Factory: sharegpt, with a system text
    {"conversations": [{"from": "human", "value": "QUESTION"}], "chosen": SHAREGPT[0], "rejected": SHAREGPT[1]},
    # OpenAI
    {"input": {"messages": [ASK], "tools": [], "parallel_tool_calls": True}, "preferred_output": [REPLY], "non_preferred_output": [BAD]},
    # ms-swift
    {"messages": [ASK, REPLY], "rejected_response": "REJECTED"},
    {"messages": [ASK, REPLY], "rejected_response": [BAD]},
]  # fmt: skip


def read(row: Any, number: int = 2, **settings: Any) -> Preference:
    return read_preference(RawRow("f.jsonl", number, row, 1), SourceConfig(path="f.jsonl", **settings), {})


def texts(record: Preference) -> list[list[tuple[str, str]]]:
    return [
        [(message.role, message.content) for message in part]
        for part in (record.prompt, record.chosen, record.rejected)
    ]


@pytest.mark.parametrize("row", [*(row for row in PAIRS if row.get("rejected") != ["REJECTED", "REJECTED"]), *MORE])
def test_every_shape_of_a_pair(row: dict[str, Any]) -> None:
    found = read(row)
    assert texts(found) == [[("user", "QUESTION")], [("assistant", "ANSWER")], [("assistant", "REJECTED")]]
    assert from_dict(found.to_dict()) == found


@pytest.mark.parametrize("value", [True, "true", 1, False, "False", 0])
@pytest.mark.parametrize("key", ["label", "kto_tag"])
@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "QUESTION", "completion": "ANSWER"},
        {"prompt": [ASK], "completion": [REPLY]},
        {"messages": [ASK, REPLY]},
        {"instruction": "QUESTION", "input": "", "output": "ANSWER"},
    ],
)
def test_label_makes_it_chosen_or_rejected(row: dict[str, Any], key: str, value: Any) -> None:
    found, answer = read({**row, key: value}), [("assistant", "ANSWER")]
    good = str(value).lower() in ("true", "1")
    assert texts(found) == [[("user", "QUESTION")], answer if good else [], [] if good else answer]
    assert not found.is_pair and from_dict(found.to_dict()) == found and found.to_dict()["label"] is good


def test_several_turns_share_all_before_the_answer() -> None:
    turns = [{"role": "system", "content": "S"}, ASK, REPLY, {"role": "user", "content": "AGAIN"}]
    found = read({"chosen": [*turns, REPLY], "rejected": [*turns, BAD]})
    assert [role for role, _ in texts(found)[0]] == ["system", "user", "assistant", "user"]
    chosen, rejected = found.dialogues
    assert [message.learn for message in chosen.messages] == [None, None, False, None, None]
    assert chosen.messages[:4] == rejected.messages[:4]


def test_columns_are_mapped_and_other_fields_reported() -> None:
    row = {"q": "QUESTION", "win": "ANSWER", "lose": "REJECTED", "score": 4}
    found = read(row, columns={"prompt": "q", "chosen": "win", "rejected": "lose"})
    assert texts(found)[2] == [("assistant", "REJECTED")] and found.unread == ("score",)


def test_ranking_entry_of_dataset_info(tmp_path: Path) -> None:
    """LLaMA-Factory's `dpo_zh_demo`, with names of its own."""
    row = {
        "talk": [{"role": "USER", "content": "QUESTION"}],
        "better": {"role": "BOT", "content": "ANSWER"},
        "worse": {"role": "BOT", "content": "REJECTED"},
    }
    entry = {
        "file_name": "x.json",
        "ranking": True,
        "formatting": "sharegpt",
        "columns": {"messages": "talk", "chosen": "better", "rejected": "worse"},
        "tags": {"role_tag": "role", "content_tag": "content", "user_tag": "USER", "assistant_tag": "BOT"},
    }
    (tmp_path / "x.json").write_text(json.dumps([row]))
    (tmp_path / "dataset_info.json").write_text(json.dumps({"x": entry}))
    named = SourceConfig(path=str(tmp_path), entry="x")
    (source,) = entry_source(named, of_preferences=True)
    found = read(row, **source.model_dump(include={"columns", "roles"}))
    assert texts(found) == [[("user", "QUESTION")], [("assistant", "ANSWER")], [("assistant", "REJECTED")]]
    with pytest.raises(DataError, match="ranking: True") as caught:
        entry_source(named)
    assert "prepare.preferences" in caught.value.remedy


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "Q", "chosen": "A", "rejected": "A"}, "equal_answers"),
        ({"prompt": "Q", "chosen": "A", "rejected": " "}, "empty_answer"),
        ({"prompt": "Q", "chosen": "A", "rejected": ""}, "unpaired"),
        ({"prompt": "", "chosen": "A", "rejected": "B"}, "no_prompt"),
        ({"chosen": "A", "rejected": "B"}, "no_prompt"),
        ({"prompt": "Q", "chosen": "A", "rejected": ["B", "C"]}, "several_answers"),
        ({"chosen": [ASK, REPLY], "rejected": [{**ASK, "content": "OTHER"}, BAD]}, "prompts_differ"),
        ({"chosen": [ASK, REPLY], "rejected": [ASK, REPLY, ASK, BAD]}, "prompts_differ"),
        ({"prompt": "Q", "completion": "A", "label": "maybe"}, "bad_label"),
        ({"messages": [ASK, REPLY]}, "unknown_format"),
        ({"prompt": "Q", "chosen": "A", "preferred": "B", "rejected": "C"}, "ambiguous"),
    ],
)
def test_bad_rows_are_rejected_with_a_reason(row: dict[str, Any], reason: str) -> None:
    with pytest.raises(RowRejected) as caught:
        read(row)
    assert caught.value.reason == reason


def test_file_without_preferences_is_refused_at_its_first_row() -> None:
    with pytest.raises(DataError, match="no chosen and rejected answer and no label") as caught:
        read({"messages": [ASK, REPLY]}, number=1)
    assert "prepare.dialogues" in caught.value.remedy


def test_cleaning_that_makes_both_answers_equal_drops_the_pair() -> None:
    found = Cleaner(Clean(), "preferences").clean(read({"prompt": "Q", "chosen": "A\u200b", "rejected": "A"}))
    assert isinstance(found, RejectedText) and found.reason == "equal_answers"
