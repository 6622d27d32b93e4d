"""Evaluation prompts include the system text, the history and the input of a row."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import write_rows
from tongwen.core.errors import DataError
from tongwen.recipe.data import SourceConfig
from tongwen.workflows.eval_prompts import read_questions


@pytest.mark.parametrize(
    ("row", "prompt", "reference"),
    [
        ({"system": "S", "prompt": "Q", "history": [["q", "a"]]}, "SqaQ", None),
        ({"instruction": "Q", "input": "I", "output": ""}, "Q\nI", None),
        ({"question": "Q", "回答": "A"}, "Q", "A"),
        ({"system": "S", "query": "Q", "response": "A"}, "SQ", "A"),
        ({"messages": [{"role": "user", "content": "Q"}], "system": "S"}, "SQ", None),
        ({"messages": [{"from": "human", "content": "Q"}]}, "Q", None),
    ],
)
def test_questions_include_system_history_and_input(
    row: dict[str, Any], prompt: str, reference: str | None, tmp_path: Path
) -> None:
    (found,) = read_questions(SourceConfig(path=str(write_rows(tmp_path / "a.jsonl", [row]))))
    assert ("".join(turn["content"] for turn in found.messages), found.reference) == (prompt, reference)


TOOL = {"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object", "properties": {}}}}
CALL = {"type": "function", "function": {"name": "get_weather", "arguments": "{}"}}


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Q", "tools": [TOOL]},
        {"messages": [{"role": "user", "content": "Q"}], "tools": json.dumps([TOOL])},
        {"instruction": "Q", "input": "", "output": "A", "functions": [TOOL]},
        {"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "tool_calls": [CALL]}], "tools": [TOOL]},
    ],
)
def test_tools_of_a_row_are_part_of_its_question(row: dict[str, Any], tmp_path: Path) -> None:
    (found,) = read_questions(SourceConfig(path=str(write_rows(tmp_path / "a.jsonl", [row]))))
    assert [turn["content"] for turn in found.messages] == ["Q"]
    assert list(found.tools) == [TOOL]
    assert found.reference == row.get("output"), "a call is no text to compare an answer with"


@pytest.mark.parametrize("answer", ["", "A"])
def test_unread_fields_are_named(answer: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    row = {"instruction": "Q", "output": answer, "difficulty": "hard", "id": 7}
    read_questions(SourceConfig(path=str(write_rows(tmp_path / "a.jsonl", [row, row]))))
    said = capsys.readouterr()
    assert "difficulty (2 rows), id (2 rows)" in said.out + said.err


def test_multimodal_question_is_refused(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "a.jsonl", [{"prompt": "Q", "images": ["a.png"]}])
    with pytest.raises(DataError, match=r"a\.jsonl:1: images"):
        read_questions(SourceConfig(path=str(file)))
