"""A row that ends with a question is asked whole: its system text, its history, its input."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.conftest import write_rows
from tongwen.core.errors import DataError
from tongwen.recipe.data import SourceConfig
from tongwen.workflows.eval_prompts import read_questions


@pytest.mark.parametrize(
    ("row", "asked", "reference"),
    [
        ({"system": "S", "prompt": "Q", "history": [["q", "a"]]}, "SqaQ", None),
        ({"instruction": "Q", "input": "I", "output": ""}, "Q\nI", None),
        ({"question": "Q", "回答": "A"}, "Q", "A"),
        ({"system": "S", "query": "Q", "response": "A"}, "SQ", "A"),
        ({"messages": [{"role": "user", "content": "Q"}], "system": "S"}, "SQ", None),
        ({"messages": [{"from": "human", "content": "Q"}]}, "Q", None),
    ],
)
def test_questions(row: dict[str, Any], asked: str, reference: str | None, tmp_path: Path) -> None:
    (found,) = read_questions(SourceConfig(path=str(write_rows(tmp_path / "a.jsonl", [row]))))
    assert ("".join(turn["content"] for turn in found.messages), found.reference) == (asked, reference)


def test_a_question_about_a_picture_is_refused(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "a.jsonl", [{"prompt": "Q", "images": ["a.png"]}])
    with pytest.raises(DataError, match=r"a\.jsonl:1: images"):
        read_questions(SourceConfig(path=str(file)))
