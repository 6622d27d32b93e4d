"""Logs of one message a row become dialogues, one for each session."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import yaml

from tongwen.core.errors import DataError
from tongwen.data.message_log import join_messages, names_of_log
from tongwen.data.reader import read_rows
from tongwen.data.row import RawRow
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


def refusal(folder: Path, rows: list[list[str]], **settings: Any) -> DataError:
    with pytest.raises(DataError) as caught:
        joined(folder, rows, **settings)
    return caught.value


TALK = [
    *(["1", "客户", "发票怎么开？"], ["1", "坐席小王", "请提供抬头。"], ["1", "客户", "某公司。"], ["1", "坐席小王", "已开具。"]),
    *(["2", "客户", "怎么退货？"], ["2", "坐席小李", "七天内可以退。"]),
]  # fmt: skip


def remedied(error: DataError) -> dict[str, Any]:
    """The source that a refusal proposes."""
    found = yaml.safe_load(error.remedy.partition(": ")[2])
    assert found.pop("path").endswith("log.csv")
    return dict(found)


def test_senders_are_refused_together_with_a_mapping_that_works(tmp_path: Path) -> None:
    rows = [["工单号", "发言人", "内容"], *TALK]
    error = refusal(tmp_path, rows)
    assert "坐席小王, 坐席小李" in error.rule
    settings = remedied(error)
    assert settings == {"roles": {"坐席小王": "assistant", "坐席小李": "assistant"}}
    assert len(joined(tmp_path, rows, **settings)) == 2


def test_a_log_with_the_newest_first_gets_the_mapping_of_its_order_in_time(tmp_path: Path) -> None:
    rows = [[*HEAD, "时间"], *([*row, f"2026-01-02 10:{at:02}:00"] for at, row in reversed([*enumerate(TALK)]))]
    assert remedied(refusal(tmp_path, rows)) == {"roles": {"坐席小李": "assistant", "坐席小王": "assistant"}}
    for row in rows[1:]:
        row[1] = row[1].replace("客户", "张三")
    assert remedied(refusal(tmp_path, rows))["roles"]["张三"] == "user"


def test_customers_by_their_names_are_any_other_name(tmp_path: Path) -> None:
    rows = [HEAD, *(row for n in range(30) for row in ([str(n), f"顾客{n}", "问"], [str(n), "阿明", "答"]))]
    settings = remedied(refusal(tmp_path, rows))
    assert settings == {"roles": {"阿明": "assistant", "*": "user"}}
    assert len(joined(tmp_path, rows, **settings)) == 30


def test_columns_of_other_names_are_proposed_from_what_they_hold(tmp_path: Path) -> None:
    long = "2026-01-02 10:00:0"  # a time is no text, however long
    rows = [["batch", "ab", "words", "nr"], *([a, b, c, f"{long}{n}"] for n, (a, b, c) in enumerate(TALK))]
    settings = remedied(refusal(tmp_path, rows))
    assert settings == {"columns": {"session_id": "batch", "role": "ab", "content": "words"}}
    assert "坐席小王" in refusal(tmp_path, rows, **settings).rule


def test_a_log_without_sessions_says_what_it_lacks(tmp_path: Path) -> None:
    assert "session_id" in refusal(tmp_path, [["发言人", "内容"], *(row[1:] for row in TALK)]).remedy


def test_neighbours_of_one_role_are_one_turn_and_notices_are_left_out(tmp_path: Path) -> None:
    rows = [
        HEAD,
        ["1", "客户", "a"],
        ["1", "客服", "b"],
        ["1", "主管", "c"],
        ["1", "系统", "已转接"],
        ["1", "客户", " "],
        ["1", "系统", "结束"],
    ]
    (dialogue,) = joined(tmp_path, rows, roles={"主管": "assistant"})
    assert turns(dialogue) == [("客户", "a"), ("客服", "b\nc")]
    assert dialogue.size == sum(raw.size for raw in read_rows(tmp_path / "log.csv"))


def test_messages_go_by_their_times_where_the_file_does_not(tmp_path: Path) -> None:
    rows = [[*HEAD, "时间"], ["1", "assistant", "b", "2026/01/02 10:00:00"], ["1", "user", "a", "2026/01/02 09:59:00"]]
    (dialogue,) = joined(tmp_path, rows)
    assert turns(dialogue) == [("user", "a"), ("assistant", "b")] and dialogue.row == 2
    rows[1][3] = "10 o'clock"
    assert turns(joined(tmp_path, rows)[0]) == [("assistant", "b"), ("user", "a")]


@pytest.mark.parametrize(
    "row", [{"instruction": "a", "output": "b"}, {"text": "a", "id": "1"}, {"prompt": "a", "completion": "b"}]
)
def test_rows_of_other_formats_are_left_alone(row: dict[str, str]) -> None:
    rows = [RawRow("f", n, row, 1) for n in range(9)]
    assert list(join_messages(iter(rows), SourceConfig(path="f"), lambda text: None)) == rows
