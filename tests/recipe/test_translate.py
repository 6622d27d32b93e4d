"""Names of other tools become the recipe's, with a notice, or are refused with the recipe's own name."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.recipe.reading import SFT, check_problem, problems, write
from tongwen.recipe.load import load_recipe


@pytest.mark.parametrize(
    ("text", "line", "value", "remedy"),
    [
        (SFT % "trainer: {learning_rate: 1}", 4, "learning_rate", "learning_rate"),
        (SFT % "trainer: {adam_beta_2: 1}", 4, "adam_beta_2", "adam_beta2"),
        (SFT % "trainer: {fp16: true}", 4, "fp16", "precision"),
        (SFT % "trainer: {hub_token: x}", 4, "hub_token", "export: {formats: [hf]"),
        (SFT % "trainer: {eval_on_start: true}", 4, "eval_on_start", "before and after"),
        (SFT % "trainer: {torch_compile_mode: x}", 4, "torch_compile_mode", "compile"),
        (SFT % "batch_size: 8, per_device_train_batch_size: 2", 4, "both spellings", "batch_size"),
        (SFT % "per_device_train_batch_size: x", 4, "whole numbers", ""),
    ],
)
def test_each_problem_names_line_value_and_remedy(
    text: str, line: int, value: str, remedy: str, tmp_path: Path
) -> None:
    check_problem(tmp_path, text, line, value, remedy)


def test_old_names_are_translated_with_a_notice(tmp_path: Path) -> None:
    recipe, notices = load_recipe(
        write(tmp_path, SFT % "trainer: {warmup_ratio: 0.1, group_by_length: true, adam_beta2: 0.98}, cutoff_len: 99")
    )
    assert recipe.sft
    assert (recipe.sft.warmup, recipe.sft.max_length, recipe.sft.trainer) == (0.1, 99, {"adam_beta2": 0.98})
    assert any("warmup_ratio" in notice and "warmup: 0.1" in notice for notice in notices)
    assert any("group_by_length" in notice and "padding" in notice for notice in notices)


def test_device_batch_is_converted_to_batch_size(tmp_path: Path) -> None:
    file = write(tmp_path, SFT % "per_device_train_batch_size: 2, gradient_accumulation_steps: 4")
    recipe, notices = load_recipe(file, ["devices=2"])
    assert recipe.sft
    assert recipe.sft.batch_size == 16
    assert "2 x 4 x 2" in notices[0]


@pytest.mark.parametrize(
    ("trainer", "message"),
    [
        ("adam_beta1: x", "recipe.yaml:4 · sft.trainer.adam_beta1: 'x' is not of type float"),
        ("dataloader_num_workers: 1.5", "1.5 is not of type int"),
        ("tf32: 1", "1 is not of type bool | None"),
        ("adam_beta1: 0, tf32: null, project: a", ""),
    ],
)
def test_wrong_type_is_refused_with_its_line(trainer: str, message: str, tmp_path: Path) -> None:
    file = write(tmp_path, SFT % f"trainer: {{{trainer}}}")
    if message:
        (problem,) = problems(file)
        assert message in problem.text()
    else:
        assert load_recipe(file)[1] == []
