"""Logs of one message a row become dialogues, one for each session."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest

from tongwen.data.message_log import join_messages, names_of_log
from tongwen.data.reader import read_rows
from tongwen.recipe.data import SourceConfig

HEAD = ["session_id", "role", "content"]


def joined(folder: Path, rows: list[list[str]], **settings: Any) -> list[Any]:
    file = folder / "log.csv"
    with file.open("w", newline="", encoding="utf-8") as out:
        csv.writer(out).writerows(rows)
    source = SourceConfig(path=str(file), **settings)
    return list(join_messages(read_rows(file, source), source, lambda text: None))


def turns(raw: Any, role: str = "role", content: str = "content", key: str = "messages") -> list[tuple[str, str]]:
    return [(turn[role], turn[content]) for turn in raw.value[key]]


def test_mixed_sessions_keep_their_order(tmp_path: Path) -> None:
    rows = [HEAD, ["1", "user", "a"], ["2", "user", "b"], ["1", "assistant", "c"], ["2", "assistant", "d"]]
    first, second = joined(tmp_path, rows)
    assert turns(first) == [("user", "a"), ("assistant", "c")] and first.row == 2
    assert turns(second) == [("user", "b"), ("assistant", "d")] and second.row == 3


def test_what_one_sender_writes_in_a_row_is_one_turn(tmp_path: Path) -> None:
    rows = [
        ["会话ID", "发送方", "内容", "时间"],
        ["1", "客户", "a", "9:00"],
        ["1", "客户", "b", "9:01"],
        ["1", "客服", "c", "9:02"],
    ]
    (dialogue,) = joined(tmp_path, rows)
    assert turns(dialogue) == [("客户", "a\nb"), ("客服", "c")]
    assert [turn["时间"] for turn in dialogue.value["messages"]] == ["9:00", "9:02"]  # counted as unread


def test_other_names_are_mapped_by_the_recipe(tmp_path: Path) -> None:
    rows = [["ticket", "who", "said"], ["1", "user", "a"], ["1", "assistant", "b"]]
    columns = {"session_id": "ticket", "role": "who", "content": "said"}
    (dialogue,) = joined(tmp_path, rows, columns=columns)
    assert turns(dialogue, "who", "said") == [("user", "a"), ("assistant", "b")]


def test_a_session_beside_a_damaged_row_is_refused_as_a_whole(tmp_path: Path) -> None:
    rows = [
        HEAD,
        ["1", "user", "a"],
        ["1", "assistant"],
        ["1", "user", "c"],
        ["2", "user", "d"],
        ["2", "assistant", "e"],
    ]
    damaged, first, second = joined(tmp_path, rows)
    assert damaged.reason == "bad_columns" and first.reason == "damaged_session" and not second.problem
    missing, rest = joined(tmp_path, [HEAD, ["1", "user", "a"], ["", "assistant", "b"]])
    assert missing.reason == "missing_key" and "session_id" in missing.problem and rest.reason == "damaged_session"


def test_sizes_add_up(tmp_path: Path) -> None:
    rows = [HEAD, *([str(number % 3), "user" if number < 6 else "assistant", "x" * number] for number in range(12))]
    dialogues = joined(tmp_path, rows)
    assert sum(raw.size for raw in dialogues) == sum(raw.size for raw in read_rows(tmp_path / "log.csv"))


@pytest.mark.parametrize(
    "row",
    [
        {"role": "user", "content": "a"},
        {"session_id": "1", "role": "user"},
        {"session_id": "1", "role": "x", "content": "y", "messages": []},
        {"question": "a", "answer": "b"},
        "text",
    ],
)
def test_other_rows_are_no_log(row: Any) -> None:
    assert names_of_log(row, SourceConfig(path="f")) is None
