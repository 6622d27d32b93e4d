"""The rules of the sections that make and prepare data."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.recipe.reading import check_problem

SYNTHESIZE = "name: a\nbase: b\nsynthesize: {endpoint: u, model: m, rows: 1, %s}\n"


@pytest.mark.parametrize(
    ("text", "line", "value", "remedy"),
    [
        ("name: a\nbase: b\nprepare: {}\n", 3, "dialogues", "data/alpaca_zh.json"),
        (SYNTHESIZE % "at_most: {money: 1}", 3, "at_most.money", "`price: {input: …, output: …}`"),
    ],
)
def test_each_problem_names_line_value_and_remedy(
    text: str, line: int, value: str, remedy: str, tmp_path: Path
) -> None:
    check_problem(tmp_path, text, line, value, remedy)
