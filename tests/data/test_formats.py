"""Every row becomes a record or a counted rejection; a file that cannot be read says where and why."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import write_rows
from tongwen.core.errors import DataError, RowRefused
from tongwen.core.records import Origin
from tongwen.data.clean import Cleaner, Dropped
from tongwen.data.files import find_files
from tongwen.data.formats import read_dialogue, recognise
from tongwen.data.input_parts import list_parts
from tongwen.data.ledger import Ledger
from tongwen.data.prepare_steps import check_losses, iter_rows, load_records
from tongwen.data.reader import read_rows
from tongwen.recipe.data import Prepare, SourceConfig

HERE, SOURCE = Origin("f", 1), SourceConfig(path="f")
ALPACA = {"instruction": "问", "input": "", "output": "答"}


def read(file: Path, fill: dict[str, str] | None = None, **source: Any) -> tuple[list[Any], list[RowRefused], Ledger]:
    """A file as `prepare` reads it: its records, what was refused, and the ledger."""
    section = Prepare(dialogues=[SourceConfig(path=str(file), **source)], fill=fill or {}, held_out=0.0)
    ledger, records, refused = Ledger("rows", "bytes"), [], []
    for part in list_parts(section, lambda path, tell: path, print):
        for raw, record in iter_rows(part, section, Cleaner(section.clean, part.kind), print):
            ledger.enter(raw.size)
            if isinstance(record, (Dropped, RowRefused)):
                ledger.lose(record.reason, raw.size)
                refused.append(record)
            else:
                ledger.keep(raw.size)
                records.append(record)
    ledger.check()
    return records, refused, ledger


@pytest.mark.parametrize(
    ("row", "roles", "last"),
    [
        (ALPACA, ["user", "assistant"], "答"),
        ({**ALPACA, "input": "文"}, ["user", "assistant"], "答"),
        (
            {**ALPACA, "system": "s", "history": [["a", "b"]]},
            ["system", "user", "assistant", "user", "assistant"],
            "答",
        ),
        (
            {"conversations": [{"from": "human", "value": "问"}, {"from": "gpt", "value": "答"}]},
            ["user", "assistant"],
            "答",
        ),
        (
            {"id": "1", "conversations": [{"from": "human", "value": "问"}, {"from": "assistant", "value": "答"}]},
            ["user", "assistant"],
            "答",
        ),
        (
            {
                "conversations": [
                    {"from": "human", "value": "天气？"},
                    {"from": "function_call", "value": '{"name": "weather", "arguments": {"city": "京"}}'},
                    {"from": "observation", "value": "晴"},
                    {"from": "gpt", "value": "晴天"},
                ],
                "tools": "[]",
            },
            ["user", "assistant", "tool", "assistant"],
            "晴天",
        ),
        (
            {
                "messages": [
                    {"role": "user", "content": "问"},
                    {"role": "assistant", "content": "答", "reasoning_content": "想"},
                ]
            },
            ["user", "assistant"],
            "答",
        ),
        (
            {
                "messages": [
                    {"role": "user", "content": "问"},
                    {"role": "assistant", "content": "<think>想</think>\n答"},
                ]
            },
            ["user", "assistant"],
            "答",
        ),
    ],
)
def test_formats(row: dict[str, Any], roles: list[str], last: str) -> None:
    format_ = recognise(row)
    assert format_
    dialogue = read_dialogue(row, format_, SOURCE, {}, HERE)
    assert [message.role for message in dialogue.messages] == roles
    assert dialogue.messages[-1].content == last


def test_alpaca_input_follows_the_instruction_on_a_new_line() -> None:
    assert read_dialogue({**ALPACA, "input": "文"}, "alpaca", SOURCE, {}, HERE).messages[0].content == "问\n文"


def test_thinking_and_tool_calls_are_kept() -> None:
    turns = [
        {"role": "user", "content": "天气？"},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": "1", "type": "function", "function": {"name": "w", "arguments": '{"c": 1}'}}],
        },
        {"role": "tool", "content": "晴"},
        {"role": "assistant", "content": "<think>想</think>\n答", "train": False},
    ]
    dialogue = read_dialogue({"messages": turns}, "messages", SOURCE, {}, HERE)
    assert dialogue.messages[1].tool_calls[0]["function"]["arguments"] == {"c": 1}
    assert (dialogue.messages[3].thinking, dialogue.messages[3].content, dialogue.messages[3].learn) == (
        "想",
        "答",
        False,
    )


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"instruction": "问", "input": ""}, "missing_key"),
        ({**ALPACA, "output": ""}, "empty_answer"),
        ({**ALPACA, "output": "  \n"}, "empty_answer"),
        ({**ALPACA, "output": 3}, "not_text"),
        ({**ALPACA, "output": None}, "not_text"),
        ({**ALPACA, "instruction": " "}, "empty_question"),
        ({**ALPACA, "history": "x"}, "bad_history"),
        ({**ALPACA, "output": "a\0b"}, "nul_character"),
        ({**ALPACA, "output": "a\ud800"}, "lone_surrogate"),
        ({"messages": []}, "no_messages"),
        ({"messages": "x"}, "no_messages"),
        ({"messages": ["x"]}, "bad_turn"),
        ({"messages": [{"role": "user", "content": "a"}]}, "no_answer"),
        ({"messages": [{"role": "assistant", "content": "a"}]}, "no_question"),
        ({"messages": [{"role": "assistant", "content": "a"}, {"role": "user", "content": "b"}]}, "answer_first"),
        (
            {
                "messages": [
                    {"role": "user", "content": "a"},
                    {"role": "user", "content": "b"},
                    {"role": "assistant", "content": "c"},
                ]
            },
            "roles_repeat",
        ),
        ({"messages": [{"role": "wizard", "content": "a"}]}, "unknown_role"),
        ({"messages": [{"role": "user", "content": ["a"]}]}, "bad_content"),
        (
            {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "tool_calls": "x"}]},
            "bad_json_inside",
        ),
        (
            {
                "messages": [
                    {"role": "user", "content": "a"},
                    {"role": "assistant", "content": "", "tool_calls": [{"function": {"arguments": {}}}]},
                ]
            },
            "bad_tool_calls",
        ),
        (
            {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "<think>x</think>"}]},
            "only_thinking",
        ),
        (
            {
                "messages": [
                    {"role": "user", "content": "a"},
                    {"role": "assistant", "content": "b"},
                    {"role": "system", "content": "c"},
                ]
            },
            "late_system",
        ),
        ({"conversations": [{"from": "human", "text": "a"}]}, "bad_content"),
        (
            {"conversations": [{"from": "human", "value": "a"}, {"from": "function_call", "value": "{"}]},
            "bad_json_inside",
        ),
    ],
)
def test_each_bad_row_has_a_reason(row: dict[str, Any], reason: str) -> None:
    with pytest.raises(RowRefused) as caught:
        read_dialogue(row, recognise(row) or "alpaca", SOURCE, {}, HERE)
    assert caught.value.reason == reason
    assert caught.value.rule


def test_placeholders_are_filled_or_refused() -> None:
    row = {**ALPACA, "output": "我是{{name}}，{{x}}"}
    assert read_dialogue(row, "alpaca", SOURCE, {"name": "小同"}, HERE).messages[1].content == "我是小同，{{x}}"
    with pytest.raises(DataError, match=r"name.*not filled") as caught:
        read_dialogue(row, "alpaca", SOURCE, {}, HERE)
    assert "fill: {name:" in caught.value.remedy


def test_array_lines_and_text_are_told_apart(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("\ufeff" + json.dumps([ALPACA, ALPACA]), encoding="utf-8")
    (tmp_path / "b.txt").write_text(json.dumps(ALPACA) + "\n\n" + json.dumps(ALPACA), encoding="utf-8")
    (tmp_path / "c.txt").write_text("一段\n仍是一段\n\n二段\n", encoding="utf-8")
    assert [row.row for row in read_rows(tmp_path / "a.json")] == [1, 2]
    assert [row.row for row in read_rows(tmp_path / "b.txt")] == [1, 3]
    assert [(row.row, row.value["text"]) for row in read_rows(tmp_path / "c.txt")] == [
        (1, "一段\n仍是一段"),
        (4, "二段"),
    ]
    assert [file.name for file in find_files(str(tmp_path))] == ["a.json", "b.txt", "c.txt"]
    assert [file.name for file in find_files(str(tmp_path / "*.txt"))] == ["b.txt", "c.txt"]


def test_bad_rows_are_counted_and_kept(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(
        json.dumps(ALPACA).encode()
        + b'\n{"instruction": \n'
        + b'{"instruction": "\xff", "output": "a"}\n{"output": "x"}\n{"instruction": NaN, "output": "x"}\n'
    )
    records, rejected, ledger = read(file)
    assert [bad.reason for bad in rejected] == ["not_json", "not_utf8", "unknown_format", "not_a_number"]
    assert (ledger.items_in, ledger.kept, len(records)) == (5, 1, 1)
    assert ledger.size_in == sum(map(len, file.read_bytes().splitlines()))


def test_too_many_bad_rows_are_refused_with_the_first_of_them() -> None:
    bad = [("a.jsonl:2", "not JSON"), ("a.jsonl:9", "no answer")]
    with pytest.raises(DataError, match=r"4 of 5[\s\S]*a\.jsonl:2: not JSON[\s\S]*… 2") as caught:
        check_losses(5, 1, 4, bad, None, "rows")
    assert "max_bad: 4" in caught.value.remedy and caught.value.place == "a.jsonl"
    check_losses(5, 1, 4, bad, 4, "rows")
    check_losses(5000, 4995, 5, bad, None, "rows")
    with pytest.raises(DataError, match="6 of 5000"):
        check_losses(5000, 4994, 6, bad, None, "rows")
    with pytest.raises(DataError, match=r"none of the 5 rows[\s\S]*format: alpaca"):
        check_losses(5, 0, 5, bad, 100, "rows")


def test_missing_files_name_the_folder_they_were_sought_in(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no such file[\s\S]*relative paths start from the current folder"):
        find_files(str(tmp_path / "none.json"))
    with pytest.raises(DataError, match="no data file"):
        find_files(str(tmp_path))


def test_columns_map_names(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "a.jsonl", [{"question": "问", "reply": "答"}])
    records, _, _ = read(file, columns={"instruction": "question", "output": "reply"})
    assert records[0].messages[1].content == "答"


def test_the_ledger_refuses_when_it_does_not_add_up() -> None:
    ledger = Ledger("rows", "bytes")
    ledger.enter(10)
    with pytest.raises(AssertionError, match="does not add up"):
        ledger.check()
    ledger.lose("reason", 10)
    assert ledger.to_dict()["lost"] == {"reason": {"rows": 1, "bytes": 10}}


def test_prepared_dialogues_read_back_the_same(tmp_path: Path) -> None:
    rows = [
        {
            "messages": [
                {"role": "user", "content": "a"},
                {"role": "assistant", "content": "b", "reasoning_content": "c", "learn": True},
            ],
            "tools": [{"type": "function"}],
        },
    ]
    before, _, _ = read(write_rows(tmp_path / "a.jsonl", rows))
    file = write_rows(tmp_path / "b.jsonl", [dialogue.to_dict() for dialogue in before])
    assert list(load_records(file)) == before


def test_the_shipped_dialogues_are_whole() -> None:
    folder = Path(__file__).parents[2] / "src" / "tongwen" / "commands" / "demo_data"
    records, rejected, _ = read(folder / "dialogues.jsonl")
    assert not rejected
    assert len(records) >= 160
    assert len({dialogue.messages[-2].content for dialogue in records}) >= 0.98 * len(records)
    fill = {"name": "小同", "author": "同文"}
    named, bad, _ = read(folder / "self_introduction.jsonl", fill)
    assert len(named) >= 20
    assert not bad
    text = "".join(message.content for dialogue in named for message in dialogue.messages)
    assert "小同" in text and "同文" in text and "{{" not in text
    aside, bad, _ = read(folder / "held_out.jsonl", fill)
    assert len(aside) == 30 and not bad
    trained = {dialogue.messages[-2].content for dialogue in records + named}
    assert not trained & {dialogue.messages[-2].content for dialogue in aside}
