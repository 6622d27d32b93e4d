"""The rules between the sections of a recipe."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.recipe.reading import check_problem


@pytest.mark.parametrize(
    ("text", "line", "value", "remedy"),
    [
        ("name: a\nbase: b\nsft: {}\n", 1, "`sft`", "`prepare: {dialogues: ...}`"),
        ("name: a\nbase: b\nprepare: {dialogues: d}\nmerge: {}\n", 1, "merge", "adapter"),
    ],
)
def test_each_problem_names_line_value_and_remedy(
    text: str, line: int, value: str, remedy: str, tmp_path: Path
) -> None:
    check_problem(tmp_path, text, line, value, remedy)
