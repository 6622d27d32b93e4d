"""Values of single fields: durations, and numbers that mean something."""

from __future__ import annotations

import json
import typing
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic.fields import FieldInfo

from tests.recipe.reading import SFT, check_problem, problems, write
from tongwen.recipe import docs
from tongwen.recipe.load import dump, load_recipe


@pytest.mark.parametrize(
    ("text", "line", "value", "remedy"),
    [
        (SFT % "stop_after: 2 weeks", 4, "2 weeks", "epochs"),
        (SFT % "stop_after: 0 epochs", 4, "0 epochs", "epochs"),
        ("name: a\nbase: b\nstop_before: soon\n", 3, "'soon'", "90 minutes"),
    ],
)
def test_each_problem_names_line_value_and_remedy(
    text: str, line: int, value: str, remedy: str, tmp_path: Path
) -> None:
    check_problem(tmp_path, text, line, value, remedy)


def numeric_settings() -> Iterator[tuple[str, FieldInfo]]:
    for section, model in docs.sections():
        for key, field in model.model_fields.items():
            if {int, float} & {field.annotation, *typing.get_args(field.annotation)}:
                yield f"{section}.{key}".lstrip("."), field


@pytest.mark.parametrize("value", [".nan", ".inf", "-.inf", "1e400", "10" * 13, "9" * 5000, "-1", "1e200"])
def test_every_numeric_setting_refuses_invalid_numbers(value: str, tmp_path: Path) -> None:
    """Each numeric setting of the schema is given the number, at a line of its own."""
    found = dict(numeric_settings())
    assert len(found) > 50 and {"seed", "sft.adapter.rank", "prepare.dedup.threshold"} <= {*found}
    base = write(tmp_path, SFT % "" + "")
    for name in found:
        overrides = [f"{name}={value}"]
        text = "\n".join(one.text() for one in problems(base, *overrides))
        assert f"command line `{name}=" in text, (name, text)
        assert name.rpartition(".")[2] in text


@pytest.mark.parametrize(
    ("text", "line", "value", "remedy"),
    [
        (SFT % "stop_after: 1e400 epochs", 4, "1e400", "epochs"),
        (SFT % "stop_after: 99999999999999 steps", 4, "99999999999999 steps", "epochs"),
        ("name: a\nbase: b\nstop_before: " + "9" * 400 + " days\n", 3, "999", "90 minutes"),
        (SFT % "warmup: 1.0", 4, "1.0", "1 means one"),
        (SFT % "warmup: 2.5", 4, "2.5", "whole number"),
        ("name: a\nbase: b\nprepare:\n  documents: d\n  held_out: 1.0\n", 5, "1.0", "1 means one"),
        (SFT % "trainer: {adam_beta1: 2}", 4, "trainer.adam_beta1: 2", "0 …"),
        (SFT % "trainer: {adam_beta2: .nan}", 4, "trainer.adam_beta2", "no setting takes"),
        (SFT % "trainer: {adam_epsilon: -1e-8}", 4, "trainer.adam_epsilon", "0 … 1"),
        (SFT % "trainer: {dataloader_num_workers: -4}", 4, "trainer.dataloader_num_workers", "0 …"),
        (SFT % "optimizer: [.nan]", 4, ".nan", "no setting takes"),
    ],
)
def test_out_of_range_number_is_refused_with_its_line(
    text: str, line: int, value: str, remedy: str, tmp_path: Path
) -> None:
    found = problems(write(tmp_path, text))[0].text()
    assert f"recipe.yaml:{line}" in found and value in found and remedy in found


def test_held_out_of_one_row_round_trips(tmp_path: Path) -> None:
    """Also in the resolved recipe of the run, which is read again."""
    recipe, _ = load_recipe(write(tmp_path, SFT.replace("d.json", "d.json, held_out: 1") % "warmup: 0.5"))
    again, _ = load_recipe(write(tmp_path, dump(recipe)))
    assert again == recipe
    assert again.prepare and again.prepare.held_out == 1


def test_invalid_numbers_of_an_engine_file_are_refused(tmp_path: Path) -> None:
    engine = tmp_path / "ds.json"
    adam = {"type": "AdamW", "params": {"betas": [2, 0.9]}}
    engine.write_text(json.dumps({"zero_optimization": {"stage": 2}, "optimizer": adam}))
    assert "adam_beta1: 2" in problems(write(tmp_path, SFT % f"engine: {engine}"))[0].text()


def test_held_out_may_be_a_file(tmp_path: Path) -> None:
    recipe, _ = load_recipe(write(tmp_path, SFT.replace("d.json", "d.json, held_out: dev.json") % ""))
    assert recipe.prepare and recipe.prepare.held_out == "dev.json"
