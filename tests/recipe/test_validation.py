"""Every problem of a recipe's values is reported in our words, with its line and its remedy."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.recipe.reading import SFT, check_problem, problems, write


@pytest.mark.parametrize(
    ("text", "line", "value", "remedy"),
    [
        ("name: a\nbase: b\nseeed: 3\n", 3, "seeed", "seed"),
        (SFT % "learning_rat: 1e-4", 4, "learning_rat", "learning_rate"),
        (SFT % "learning_rate: fast", 4, "fast", "learning_rate"),
        (SFT % "learning_rate: true", 4, "True", "learning_rate"),
        (SFT % "batch_size: 0", 4, "0", "samples per optimizer step"),
        (SFT % "batch_size: 2.5", 4, "2.5", "samples per optimizer step"),
        (SFT % "learn: assistent", 4, "assistent", "assistant"),
        (SFT % "adapter: {method: lroa}", 4, "lroa", "lora"),
        (SFT % "adapter: {rang: 8}", 4, "rang", "rank"),
        ("name: a b\nbase: b\n", 1, "a b", "name of the run"),
        ("name: a\n", 1, "base", "model"),
    ],
)
def test_each_problem_names_line_value_and_remedy(
    text: str, line: int, value: str, remedy: str, tmp_path: Path
) -> None:
    check_problem(tmp_path, text, line, value, remedy)


def test_all_problems_are_reported_at_once(tmp_path: Path) -> None:
    file = write(
        tmp_path,
        "name: a\nbase: b\nseeed: 1\nprepare: {dialogues: d}\nsft:\n  learn: all\n  rank: 3\n  adapter:\n    rank: x\n",
    )
    lines = sorted(int(error.place.split(":")[1].split(" ")[0]) for error in problems(file))
    assert lines == [3, 6, 7, 9]
