"""Every row becomes a record or a counted rejection; a file that cannot be read says where and why."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.conftest import write_rows
from tests.data.rows import ASK, HERE, PLAIN, REPLY, SOURCE, as_dialogue, role_and_text
from tongwen.core.errors import DataError, RowRejected
from tongwen.core.records import from_dict
from tongwen.data import formats
from tongwen.data.clean import Cleaner, RejectedText
from tongwen.data.files import find_files
from tongwen.data.formats import read_dialogue, recognise
from tongwen.data.input_parts import list_parts
from tongwen.data.ledger import Ledger
from tongwen.data.prepare_steps import check_losses, iter_rows, load_records
from tongwen.data.reader import read_rows
from tongwen.data.turns import THOUGHTS
from tongwen.recipe.data import Prepare, SourceConfig

ALPACA = {"instruction": "问", "input": "", "output": "答"}


def read(file: Path, fill: dict[str, str] | None = None, **source: Any) -> tuple[list[Any], list[RowRejected], Ledger]:
    """A file as `prepare` reads it: its records, what was refused, and the ledger."""
    section = Prepare(dialogues=[SourceConfig(path=str(file), **source)], fill=fill or {}, held_out=0.0)
    ledger, records, refused = Ledger("rows", "bytes"), [], []
    for part in list_parts(section, lambda path, tell: path, print):
        for raw, record in iter_rows(part, section, Cleaner(section.clean, part.kind), print):
            ledger.enter(raw.size)
            if isinstance(record, (RejectedText, RowRejected)):
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
def test_recognised_formats_are_read(row: dict[str, Any], roles: list[str], last: str) -> None:
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
        ({"conversations": [{"from": "human", "say": "a"}]}, "bad_content"),
        (
            {"conversations": [{"from": "human", "value": "a"}, {"from": "function_call", "value": "{"}]},
            "bad_json_inside",
        ),
    ],
)
def test_each_bad_row_has_a_reason(row: dict[str, Any], reason: str) -> None:
    with pytest.raises(RowRejected) as caught:
        read_dialogue(row, recognise(row) or "alpaca", SOURCE, {}, HERE)
    assert caught.value.reason == reason
    assert caught.value.rule


def test_placeholders_are_filled_or_refused() -> None:
    row = {**ALPACA, "output": "我是{{name}}，{{x}}"}
    assert read_dialogue(row, "alpaca", SOURCE, {"name": "小同"}, HERE).messages[1].content == "我是小同，{{x}}"
    with pytest.raises(DataError, match=r"name.*not filled") as caught:
        read_dialogue(row, "alpaca", SOURCE, {}, HERE)
    assert "fill: {name:" in caught.value.remedy


def test_json_array_json_lines_and_text_are_distinguished(tmp_path: Path) -> None:
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


def test_too_many_bad_rows_are_refused_with_examples() -> None:
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


def test_missing_file_names_the_searched_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no such file[\s\S]*relative paths start from the current folder"):
        find_files(str(tmp_path / "none.json"))
    with pytest.raises(DataError, match="no data file"):
        find_files(str(tmp_path))


def test_columns_map_names(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "a.jsonl", [{"question": "问", "reply": "答"}])
    records, _, _ = read(file, columns={"instruction": "question", "output": "reply"})
    assert records[0].messages[1].content == "答"


def test_ledger_that_does_not_add_up_raises() -> None:
    ledger = Ledger("rows", "bytes")
    ledger.enter(10)
    with pytest.raises(AssertionError, match="does not add up"):
        ledger.check()
    ledger.lose("reason", 10)
    assert ledger.to_dict()["lost"] == {"reason": {"rows": 1, "bytes": 10}}


def test_prepared_dialogues_round_trip(tmp_path: Path) -> None:
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


def test_shipped_dialogues_are_complete() -> None:
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
    assert len(aside) == 40 and not bad
    trained = {dialogue.messages[-2].content for dialogue in records + named}
    assert not trained & {dialogue.messages[-2].content for dialogue in aside}


# -- every field is read, or said to be unread ---------------------------------------------------------------------


@pytest.mark.parametrize("name", THOUGHTS)
@pytest.mark.parametrize("shape", ["messages", "conversations", "alpaca", "completion", "query", "pair", "rounds"])
def test_thinking_is_read_under_each_of_its_names(shape: str, name: str) -> None:
    rows: dict[str, dict[str, Any]] = {
        "messages": {"messages": [ASK, {**REPLY, "reasoning_content": None, name: "THOUGHT"}]},
        "conversations": {
            "conversations": [
                {"from": "human", "value": "QUESTION"},
                {"from": "gpt", "value": "ANSWER", name: "THOUGHT"},
            ]
        },
        "alpaca": {"instruction": "QUESTION", "input": "", "output": "ANSWER", name: "THOUGHT"},
        "completion": {"prompt": [ASK], "completion": [REPLY], name: "THOUGHT"},
        "query": {"query": "QUESTION", "response": "ANSWER", name: "THOUGHT"},
        "pair": {"question": "QUESTION", "answer": "ANSWER", name: "THOUGHT"},
        "rounds": {"conversation": [{"human": "QUESTION", "assistant": "ANSWER", name: "THOUGHT"}]},
    }
    found = as_dialogue(rows[shape])
    assert (role_and_text(found), found.messages[-1].thinking, found.unread) == (PLAIN, "THOUGHT", ())


def test_two_kinds_of_thinking_are_refused() -> None:
    for row in (
        {"messages": [ASK, {**REPLY, "reasoning": "a", "thinking": "b"}]},
        {"messages": [ASK, {**REPLY, "reasoning": "a"}], "thinking": "b"},
        {"instruction": "a", "output": "<think>b</think>c", "reasoning": "d"},
        {"messages": [ASK, {**REPLY, "reasoning": "a", "content": [{"type": "thinking", "thinking": "b"}, {"type": "text", "text": "c"}]}]},
    ):  # fmt: skip
        with pytest.raises(RowRejected) as caught:
            as_dialogue(row)
        assert caught.value.reason == "ambiguous"
    again = as_dialogue({"instruction": "a", "output": "<think>\nb\n</think>\nc", "reasoning": "b"}).messages[-1]
    assert (again.thinking, again.content) == ("b", "c")


@pytest.mark.parametrize(
    ("row", "unread"),
    [
        ({"messages": [ASK, REPLY], "id": 7, "meta": {}, "tags": [], "note": None}, ("id",)),
        ({"messages": [ASK, {**REPLY, "refusal": "no", "audio": None}]}, ("messages.refusal",)),
        ({"messages": [{**ASK, "reasoning": "a", "train": True}, REPLY]}, ("messages.reasoning", "messages.train")),
        ({"messages": [ASK, REPLY], "reasoning": "on", "label": 3}, ("reasoning", "label")),
        ({"messages": [ASK, REPLY, ASK, REPLY], "reasoning": "whose?"}, ("reasoning",)),
        ({"messages": [ASK, {**REPLY, "content": [{"type": "text", "text": "a", "cache": 1}]}]}, ("messages.content.cache",)),
        (
            {"messages": [ASK, {"role": "assistant", "tool_calls": [{"index": 1, "function": {"name": "f", "x": 1}}]}, {"role": "tool", "content": "r"}, REPLY]},
            ("messages.tool_calls.index", "messages.tool_calls.function.x"),
        ),
        ({"instruction": "a", "output": "b", "question": "c"}, ("question",)),
        ({"question": "a", "answer": "b", "std_answer": "c"}, ("std_answer",)),
    ],
)  # fmt: skip
def test_unread_fields_are_named(row: dict[str, Any], unread: tuple[str, ...]) -> None:
    assert as_dialogue(row).unread == unread
    assert as_dialogue(row, ignore=list(unread)).unread == ()


def test_remapped_column_is_unread() -> None:
    found = as_dialogue(
        {"ask": "QUESTION", "reply": "ANSWER", "output": "x"}, columns={"instruction": "ask", "output": "reply"}
    )
    assert (role_and_text(found), found.unread) == (PLAIN, ("output",))


def test_unread_fields_are_counted_by_file(tmp_path: Path, tongwen: Any) -> None:
    write_rows(tmp_path / "a.jsonl", [{"instruction": f"问{row}", "output": "答", "id": row} for row in range(1, 5)])
    write_rows(tmp_path / "b.jsonl", [{"instruction": f"问{row}", "output": "答", "tag": "x"} for row in range(6, 9)])
    recipe = tmp_path / "r.yaml"
    for ignored, reported in (("", True), (", ignore: [id, tag]", False)):
        recipe.write_text(
            f"name: r\nbase: {tmp_path}/none\nout: {tmp_path}/out{len(ignored)}\n"
            f"prepare: {{dialogues: {{path: '{tmp_path}/*.jsonl'{ignored}}}, held_out: 0}}\n",
            encoding="utf-8",
        )
        for argv in (("check", recipe), ("run", recipe, "--until", "prepare")):
            code, *printed = tongwen(*argv)
            assert code == 0
            assert ("id (4 rows), tag (3 rows)" in " ".join(" ".join(printed).split())) is reported
        manifest = json.loads((tmp_path / f"out{len(ignored)}" / "prepare" / "manifest.json").read_text())
        files = manifest["ledger"]["dialogues"]["files"]
        assert [file.get("unread") for file in files.values()] == (
            [{"id": 4}, {"tag": 3}] if reported else [None, None]
        )


def test_ids_and_names_reach_the_template_unchanged() -> None:
    call = {"id": "call12345", "type": "function", "function": {"name": "w", "arguments": "{}"}}
    turns = [
        {**ASK, "name": "bob"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call12345", "name": "w", "content": "r"},
        REPLY,
    ]
    found = as_dialogue({"messages": turns})
    assert found.unread == ()
    question, called, answered, _ = (message.to_dict() for message in found.messages)
    assert (question["name"], called["tool_calls"][0]["id"]) == ("bob", "call12345")
    assert (answered["tool_call_id"], answered["name"]) == ("call12345", "w")
    assert from_dict(found.to_dict()) == found
    with pytest.raises(RowRejected, match=r"turn 3: tool_call_id is a number"):
        as_dialogue({"messages": [*turns[:2], {**turns[2], "tool_call_id": 5}, REPLY]})


def test_columns_rename_turn_keys_but_not_call_arguments() -> None:
    call = {"id": "x", "function": {"name": "f", "arguments": {"text": 1}}}
    turns = [
        {"who": "user", "text": "QUESTION"},
        {"who": "assistant", "text": None, "tool_calls": [call]},
        {"who": "tool", "text": [{"type": "text", "text": "r"}], "speaker": "f", "tool_call_id": "x"},
        {"who": "assistant", "text": "ANSWER"},
    ]
    found = as_dialogue({"messages": turns}, columns={"role": "who", "content": "text", "name": "speaker"})
    assert [message.content for message in found.messages] == ["QUESTION", "", "r", "ANSWER"]
    assert found.messages[1].tool_calls == ({"id": "x", "type": "function", "function": call["function"]},)
    assert (found.messages[2].name, found.unread) == ("f", ())


def test_content_parts_become_text_thinking_and_calls() -> None:
    parts = [
        {"type": "reasoning", "value": "THOUGHT"},
        {"type": "text", "value": "AN"},
        {"type": "text", "text": "SWER"},
    ]
    turns = [
        {"role": "system", "content": [{"type": "text", "value": "SYSTEM"}], "loss_weight": 0.0},
        {"role": "user", "content": [{"type": "text", "value": "QUESTION"}], "loss_weight": 0.0},
        {"role": "assistant", "content": parts, "loss_weight": 0.0},
        {"role": "user", "content": [{"type": "text", "value": "AGAIN"}], "loss_weight": 0.0},
        {"role": "assistant", "content": [{"type": "tool_call", "value": '{"name": "f", "arguments": {"x": 1}}'}], "loss_weight": 1.0},
        {"role": "tool", "content": [{"type": "text", "value": "r"}], "loss_weight": 0.0},
        {"role": "assistant", "content": parts[1:], "loss_weight": 1.0},
    ]  # fmt: skip
    found = as_dialogue({"messages": turns})
    assert found.unread == ()
    answers = [message for message in found.messages if message.role == "assistant"]
    assert [(turn.content, turn.thinking, turn.learn) for turn in answers] == [
        ("ANSWER", "THOUGHT", False), ("", None, True), ("ANSWER", None, True),
    ]  # fmt: skip
    assert answers[1].tool_calls[0]["function"] == {"name": "f", "arguments": {"x": 1}}
    with pytest.raises(RowRejected, match=r"0\.5 does not say whether"):
        as_dialogue({"messages": [ASK, {**REPLY, "loss_weight": 0.5}]})


def test_separate_call_turns_become_one_answer() -> None:
    calls = [{"role": "tool_call", "content": json.dumps({"name": name, "arguments": {}})} for name in "fg"]
    results = [{"role": "tool_response", "content": name} for name in "fg"]
    found = as_dialogue({"messages": [ASK, *calls, *results, REPLY], "tools": "[]"})
    assert [message.role for message in found.messages] == ["user", "assistant", "tool", "tool", "assistant"]
    assert [call["function"]["name"] for call in found.messages[1].tool_calls] == ["f", "g"]


@pytest.mark.parametrize(
    ("row", "turns"),
    [
        ({"system": "S", "query": "Q", "response": "A"}, "SQA"),
        ({"query": "Q", "response": "A", "history": [["q", "a"]]}, "qaQA"),
        ({"instruction": "Q", "response": "A"}, "QA"),
        ({"input": "Q", "output": "A"}, "QA"),
        ({"output": "A", "prompt": "Q", "system": "S"}, "SQA"),
        ({"conversation": [{"human": "q", "assistant": "a"}, {"human": "Q", "assistant": "A"}], "system": "S"}, "SqaQA"),
        ({"conversation": [{"system": "S", "input": "q", "output": "a"}, {"input": "Q", "output": "A"}]}, "SqaQA"),
        ({"conversations": [{"user": "q", "bot": "a"}, {"user": "Q", "bot": "A"}]}, "qaQA"),
        ({"conversation": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]}, "QA"),
        ({"messages": [{"role": "系统", "content": "S"}, {"role": "用户", "content": "Q"}, {"role": "助手", "content": "A"}]}, "SQA"),
        ({"prompt": "Q", "completion": [{"role": "assistant", "content": "A"}]}, "QA"),
    ],
)  # fmt: skip
def test_formats_of_other_tools_are_read(row: dict[str, Any], turns: str) -> None:
    found = as_dialogue(row)
    assert "".join(message.content for message in found.messages) == turns
    assert found.unread == ()


def test_context_is_appended_to_the_question() -> None:
    found = as_dialogue({"instruction": "Q", "context": "C", "response": "A"})
    assert (found.messages[0].content, found.unread) == ("Q\nC", ())


@pytest.mark.parametrize("place", ["row", "turn"])
@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("images", ["a.png"], "images"),
        ("image", {"bytes": None, "path": "a.png"}, "images"),
        ("image_url", "http://a", "images"),
        ("videos", ["a.mp4"], "videos"),
        ("audio", "a.wav", "audios"),
        ("audio_path", "a.wav", "audios"),
    ],
)
def test_multimodal_row_is_refused_with_its_field(place: str, key: str, value: Any, reason: str) -> None:
    row = {"messages": [ASK, REPLY], key: value} if place == "row" else {"messages": [{**ASK, key: value}, REPLY]}
    with pytest.raises(RowRejected, match=key) as caught:
        as_dialogue(row)
    assert caught.value.reason == reason
    assert role_and_text(as_dialogue({"messages": [{**ASK, key: None}, REPLY], key: []})) == PLAIN
    assert role_and_text(as_dialogue(row, ignore=[key if place == "row" else f"messages.{key}"])) == PLAIN


def test_undeclared_nulls_are_padding() -> None:
    def tool(name: str, **properties: Any) -> dict[str, Any]:
        return {
            "type": "function",
            "function": {"name": name, "parameters": {"type": "object", "properties": properties}},
        }

    text = {"type": "string", "default": None}
    call = {"function": {"name": "w", "arguments": {"city": "北京", "unit": None, "zone": None}}}
    turns = [ASK, {"role": "assistant", "tool_calls": [call]}, {"role": "tool", "content": "r"}, REPLY]
    found = as_dialogue(
        {"messages": turns, "tools": [tool("w", city=text, unit=text, zone=None), tool("t", city=None, zone=text)]}
    )
    assert found.messages[1].tool_calls[0]["function"]["arguments"] == {"city": "北京", "unit": None}
    assert [one["function"]["parameters"]["properties"] for one in found.tools] == [
        {"city": text, "unit": text},
        {"zone": text},
    ]


def test_parquet_schema_padding_changes_no_object(tmp_path: Path) -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")

    def call(**arguments: Any) -> dict[str, Any]:
        return {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"id": "x", "function": {"name": "f", "arguments": arguments}}],
        }

    end = [{"role": "tool", "content": "r", "tool_call_id": "x"}, REPLY]
    rows = [
        {"messages": [ASK, call(city="北京", when={"day": 1}), *end]},
        {"messages": [ASK, call(zone="CST", when={"hour": 2}, many=[{"a": 1}, {"b": 2}]), *end]},
        {"messages": [ASK, call(), *end]},
    ]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    write_rows(tmp_path / "b.jsonl", rows)
    (table, _, _), (lines, _, _) = read(tmp_path / "a.parquet"), read(tmp_path / "b.jsonl")
    for one, other in zip(table, lines, strict=True):
        assert one.messages[0] == other.messages[0]
        mine, theirs = (record.messages[1].tool_calls[0]["function"]["arguments"] for record in (one, other))
        assert {key: value for key, value in mine.items() if value != {}} == theirs
        assert one.messages[2:] == other.messages[2:]
        assert not one.unread and not other.unread


# -- advice that is followed ---------------------------------------------------------------------------------------

ADVISED = [
    {"ask": "QUESTION", "reply": "ANSWER"},
    {"reply": "ANSWER", "ask": "QUESTION"},
    {"my_answer": "ANSWER", "topic": "QUESTION"},
    {"Instruction": "QUESTION", "Output": "ANSWER"},
    {"title": "x", "query_text": "QUESTION", "response_text": "ANSWER"},
    {"response_text": "ANSWER", "query_text": "QUESTION", "url": "x"},
    {"system_prompt": "SYSTEM", "query_text": "QUESTION", "response_text": "ANSWER"},
    {"Question": "QUESTION", "Complex_CoT": "THOUGHT", "Response": "ANSWER"},
    {"the: question": "QUESTION", "the, answer": "ANSWER"},
    {"messages": [{"role": "买家", "content": "QUESTION"}, {"role": "卖家", "content": "ANSWER"}]},
    {"conversations": [{"from": "A, B", "value": "QUESTION"}, {"from": "gpt", "value": "ANSWER"}]},
    {"messages": [{"role": "Doctor", "content": "QUESTION"}, {"role": "Patient", "content": "ANSWER"}]},
]


@pytest.mark.parametrize("row", ADVISED)
def test_suggested_columns_and_roles_work(row: dict[str, Any]) -> None:
    with pytest.raises(DataError) as caught:
        as_dialogue(row)
    told = re.findall(r"\b(columns|roles): (\{.*?\})(?:\}|$)", caught.value.text(), re.MULTILINE)
    found = as_dialogue(row, **{word: yaml.safe_load(value) for word, value in told})
    assert role_and_text(found) == [*([("system", "SYSTEM")] if "system_prompt" in row else []), *PLAIN]
    assert found.messages[-1].thinking == ("THOUGHT" if "Complex_CoT" in row else None)


@pytest.mark.parametrize(
    "row",
    [
        {"a1": "x", "b1": "y", "c1": "z"},
        {"question_1": "x", "question_2": "y", "answer_1": "z"},
        {"prompt_a": "x", "prompt_b": "y"},
    ],
)
def test_unknown_question_column_gets_a_placeholder_remedy(row: dict[str, Any]) -> None:
    with pytest.raises(DataError, match=r"columns: \{instruction: YOUR_QUESTION, output: YOUR_ANSWER\}"):
        as_dialogue(row)


FLAT_TEXTS = ("问", " 问 \n", "", "  ", '{"a": 1}', '"x', "{{name}}", "Human: 问\n\nAssistant: 答\n\nHuman: 再", "<think>想</think>答", "<think>想</think>", "\ud800", "a\0b", None, 3)  # fmt: skip


@pytest.mark.parametrize("keys", [("instruction", "input", "output"), ("instruction", "output", "reasoning"), ("question", "answer"), ("prompt", "completion"), ("query", "response", "cot")])  # fmt: skip
def test_short_way_of_flat_rows_reads_as_the_long_way(keys: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of a question and an answer alone have a way of their own; an ignored field sends them the other way."""

    def outcome(row: dict[str, Any], **words: Any) -> Any:
        try:
            found = as_dialogue(row, **words)
        except DataError as error:
            return type(error), getattr(error, "reason", ""), error.rule
        return found.messages, found.tools, found.unread

    for values in itertools.product(FLAT_TEXTS, repeat=len(keys)):
        row = dict(zip(keys, values, strict=True))
        assert outcome(row) == outcome(row, ignore=["no_such_field"]), row
    used: list[Any] = []
    read_flat = formats._read_flat
    monkeypatch.setattr(formats, "_read_flat", lambda *words: used.append(read_flat(*words)) or used[-1])
    as_dialogue(dict.fromkeys(keys, "文"))
    assert used[0] is not None, "the short way is taken"
