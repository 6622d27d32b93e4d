"""YAML keeps the place of every value; overrides pass the same reader."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.recipe.reading import SFT, check_problem, problems, write
from tongwen.recipe.load import load_recipe


@pytest.mark.parametrize(
    ("text", "line", "value", "remedy"),
    [
        ("name: a\nbase: b\nseed: 3\nseed: 4\n", 4, "seed", "keep one"),
        ("name: [a\n", 2, "YAML", "indentation"),
        ("just text\n", 1, "mapping", "tongwen init"),
    ],
)
def test_each_problem_names_line_value_and_remedy(
    text: str, line: int, value: str, remedy: str, tmp_path: Path
) -> None:
    check_problem(tmp_path, text, line, value, remedy)


def test_numbers_and_words_follow_yaml_1_2(tmp_path: Path) -> None:
    recipe, _ = load_recipe(write(tmp_path, SFT % "learning_rate: 1e-4, thinking: on, weight_decay: 1"))
    assert recipe.sft
    assert recipe.sft.learning_rate == 1e-4
    assert recipe.sft.thinking == "on"
    assert recipe.sft.weight_decay == 1.0


def test_overrides_pass_the_same_reader(tmp_path: Path) -> None:
    file = write(tmp_path, SFT % "learning_rate: 1e-4")
    recipe, _ = load_recipe(file, ["sft.learning_rate=3e-4", "sft.adapter.rank=2", "seed=7"])
    assert recipe.sft
    assert (recipe.sft.learning_rate, recipe.sft.adapter.rank, recipe.seed) == (3e-4, 2, 7)
    assert "command line `sft.adapter.rank=x`" in problems(file, "sft.adapter.rank=x")[0].text()
    assert "section.key=value" in problems(file, "nonsense")[0].text()
