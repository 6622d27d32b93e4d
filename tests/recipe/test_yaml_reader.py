"""YAML keeps the place of every value; overrides pass the same reader."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.recipe.reading import SFT, check_problem, problems, write
from tongwen.core.errors import RecipeError
from tongwen.recipe.load import load_recipe
from tongwen.recipe.yaml_reader import read_foreign


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


def test_scalars_follow_yaml_1_2(tmp_path: Path) -> None:
    recipe, _ = load_recipe(write(tmp_path, SFT % "learning_rate: 1e-4, thinking: on, weight_decay: 1"))
    assert recipe.sft
    assert recipe.sft.learning_rate == 1e-4
    assert recipe.sft.thinking == "on"
    assert recipe.sft.weight_decay == 1.0


def test_overrides_use_the_same_parser(tmp_path: Path) -> None:
    file = write(tmp_path, SFT % "learning_rate: 1e-4")
    recipe, _ = load_recipe(file, ["sft.learning_rate=3e-4", "sft.adapter.rank=2", "seed=7"])
    assert recipe.sft
    assert (recipe.sft.learning_rate, recipe.sft.adapter.rank, recipe.seed) == (3e-4, 2, 7)
    assert "command line `sft.adapter.rank=x`" in problems(file, "sft.adapter.rank=x")[0].text()
    assert "section.key=value" in problems(file, "nonsense")[0].text()


BOMB = "a0: &a0 [x,x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"a{level}: &a{level} [{','.join([f'*a{level - 1}'] * 10)}]\n" for level in range(1, 10)
)


@pytest.mark.parametrize(
    ("text", "line", "value", "remedy"),
    [
        (BOMB + SFT % "", 4, "aliases repeat more than 10,000 values", ""),
        ("name: &x [*x]\nbase: b\n", 1, "stands inside of what it stands for", ""),
        (SFT % "" + "x: &x\n  <<: *x\n", 6, "stands inside of what it stands for", ""),
        ("name: " + "[" * 500 + "]" * 500 + "\n", 1, "more than 32 deep", ""),
        ("".join(" " * depth + "a:\n" for depth in range(400)), 32, "more than 32 deep", ""),
        (SFT % "batch_size: !!bool hello", 4, "hello", ""),
        (SFT % "batch_size: !!timestamp hello", 4, "timestamp", "not supported"),
        (SFT % "batch_size: !!python/object:os.system ls", 4, "python", "not supported"),
        ("name: a\nbase: b\n? [a]\n: b\n", 3, "a key must be a word", ""),
        ("name: a\nbase: b\nout: \x07\n", 3, "'\\x07'", "not allowed"),
        ('name: a\nbase: b\nout: "a\\0b"\n', 3, "'a\\x00b'", "no setting takes"),
        ('name: a\nbase: "\\ud800"\n', 2, "\\ud800", "no setting takes"),
        ('name: a\nbase: b\n"\\0": b\n', 3, "a key must be a word", ""),
    ],
)
def test_hostile_or_invalid_yaml_is_refused_with_its_line(
    text: str, line: int, value: str, remedy: str, tmp_path: Path
) -> None:
    found = problems(write(tmp_path, text))[0].text()
    assert f"recipe.yaml:{line}" in found and value in found and remedy in found


def test_yaml_alias_is_expanded(tmp_path: Path) -> None:
    text = SFT % "adapter: &a {rank: 4, targets: [q_proj]}" + "pretrain: {adapter: *a}\n"
    recipe, _ = load_recipe(write(tmp_path, text.replace("d.json", "d.json, documents: d.txt")))
    assert recipe.sft and recipe.pretrain
    assert recipe.sft.adapter == recipe.pretrain.adapter
    assert recipe.sft.adapter.rank == 4


def test_overrides_have_the_same_limits(tmp_path: Path) -> None:
    file = write(tmp_path, SFT % "")
    assert "name" in problems(file, "name=&a [*a]")[0].text()
    assert "1e26" in problems(file, "seed=1e26")[0].text()


@pytest.mark.parametrize(
    "text", [BOMB, "a: &a [*a]", "a: &a {<<: *a}", "[" * 99 + "]" * 99, "a: !!bool x", "a: !!timestamp x"]
)
def test_files_of_other_programs_have_the_same_limits(text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        read_foreign(text, is_json=False)
    with pytest.raises(ValueError, match=r"."):
        read_foreign("[" * 99 + "]" * 99, is_json=True)
    assert read_foreign("a: &a {b: on}\nc: *a", is_json=False) == {"a": {"b": True}, "c": {"b": True}}


def test_endless_device_file_is_refused() -> None:
    with pytest.raises(RecipeError, match="too large"):
        load_recipe("/dev/zero")
