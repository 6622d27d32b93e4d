"""A recipe is read whole or refused with every problem, its line and its cure."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tongwen.core.errors import RecipeError, SeveralErrors, TongwenError
from tongwen.recipe.aliases import OWNED, training_arguments
from tongwen.recipe.docs import sections, settings, to_markdown
from tongwen.recipe.load import dump, load_recipe

PRETRAIN = "name: a\nbase: b\nprepare: {documents: d}\npretrain: {%s}\n"
GOOD = "name: a\nbase: b\nprepare: {dialogues: d.json}\nsft: {%s}\n"


def write(folder: Path, text: str) -> Path:
    file = folder / "recipe.yaml"
    file.write_text(text, encoding="utf-8")
    return file


def problems(file: Path, *overrides: str) -> list[TongwenError]:
    with pytest.raises(TongwenError) as caught:
        load_recipe(file, overrides)
    assert caught.value.exit_code == 2
    return caught.value.errors if isinstance(caught.value, SeveralErrors) else [caught.value]


@pytest.mark.parametrize(
    ("text", "line", "value", "remedy"),
    [
        ("name: a\nbase: b\nseeed: 3\n", 3, "seeed", "seed"),
        ("name: a\nbase: b\nseed: 3\nseed: 4\n", 4, "seed", "keep one"),
        (GOOD % "learning_rat: 1e-4", 4, "learning_rat", "learning_rate"),
        (GOOD % "learning_rate: fast", 4, "fast", "learning_rate"),
        (GOOD % "learning_rate: true", 4, "True", "learning_rate"),
        (GOOD % "batch_size: 0", 4, "0", "samples per optimizer step"),
        (GOOD % "batch_size: 2.5", 4, "2.5", "samples per optimizer step"),
        (GOOD % "learn: assistent", 4, "assistent", "assistant"),
        (GOOD % "stop_after: 2 weeks", 4, "2 weeks", "epochs"),
        (GOOD % "stop_after: 0 epochs", 4, "0 epochs", "epochs"),
        (GOOD % "adapter: {method: lroa}", 4, "lroa", "lora"),
        (GOOD % "adapter: {rang: 8}", 4, "rang", "rank"),
        (GOOD % "adapter: {targets: q_proj}", 4, "q_proj", "all-linear"),
        (GOOD % "trainer: {learning_rate: 1}", 4, "learning_rate", "learning_rate"),
        (GOOD % "trainer: {adam_beta_2: 1}", 4, "adam_beta_2", "adam_beta2"),
        (GOOD % "trainer: {fp16: true}", 4, "fp16", "precision"),
        (GOOD % "trainer: {hub_token: x}", 4, "hub_token", "export: {formats: [hf]"),
        (GOOD % "trainer: {eval_on_start: true}", 4, "eval_on_start", "before and after"),
        (GOOD % "trainer: {torch_compile_mode: x}", 4, "torch_compile_mode", "compile"),
        (GOOD % "adapter: {targets: []}", 4, "targets", "all-linear"),
        (GOOD % "adapter: {method: full, also_train: [norm]}", 4, "also_train", "method: lora"),
        (GOOD % "adapter: {method: new_rows, continue_from: f}", 4, "continue_from", "method: lora"),
        (GOOD % "adapter: {target_parameters: [w], dora: true}", 4, "target_parameters", "`dora`"),
        (GOOD % "adapter: {target_parameters: [w], dropout: 0.1}", 4, "target_parameters", "`dropout`"),
        (GOOD % "adapter: {method: qlora, quantize: int8, dora: true}", 4, "dora", "quantize: nf4"),
        (GOOD % "decay: 0.1", 4, "decay", "schedule: wsd"),
        (GOOD % "optimizer: muon, adapter: {method: full}", 4, "muon", "optimizer: adamw"),
        (PRETRAIN % "optimizer: muon, train: new_rows", 4, "new_rows", "optimizer: adamw"),
        (
            PRETRAIN % "optimizer: muon, phases: [{train: lora}, {train: lora+embeddings}]",
            4,
            "lora+embeddings",
            "adamw",
        ),
        (PRETRAIN % "train: full, adapter: {method: qlora}", 4, "qlora", "train: lora"),
        (PRETRAIN % "phases: [{train: embeddings}], adapter: {method: qlora}", 4, "train: embeddings", "train: lora"),
        (PRETRAIN % "train: full, adapter: {continue_from: f}", 4, "continue_from", "tongwen merge"),
        (PRETRAIN % "embedding_learning_rate: 1e-4", 4, "embedding_learning_rate", "train: lora+embeddings"),
        (
            PRETRAIN % "phases: [{train: lora, embedding_learning_rate: 1e-4}, {train: new_rows}]",
            4,
            "embedding_learning_rate",
            "train: lora+embeddings",
        ),
        (GOOD % "batch_size: 8, per_device_train_batch_size: 2", 4, "both spellings", "batch_size"),
        (GOOD % "per_device_train_batch_size: x", 4, "whole numbers", ""),
        ("name: a b\nbase: b\n", 1, "a b", "name of the run"),
        ("name: a\n", 1, "base", "model"),
        ("name: a\nbase: b\nprepare: {}\n", 3, "dialogues", "data/alpaca_zh.json"),
        ("name: a\nbase: b\nsft: {}\n", 1, "prepare", "dialogues"),
        ("name: a\nbase: b\nprepare: {dialogues: d}\nmerge: {}\n", 1, "merge", "adapter"),
        ("name: [a\n", 2, "YAML", "indentation"),
        ("just text\n", 1, "mapping", "tongwen init"),
    ],
)
def test_each_problem_names_line_value_and_remedy(
    tmp_path: Path, text: str, line: int, value: str, remedy: str
) -> None:
    found = problems(write(tmp_path, text))
    assert len(found) == 1, found
    message = found[0].text()
    assert f"recipe.yaml:{line}" in message
    assert value in message
    assert remedy in message


def test_all_problems_at_once(tmp_path: Path) -> None:
    file = write(
        tmp_path,
        "name: a\nbase: b\nseeed: 1\nprepare: {dialogues: d}\nsft:\n  learn: all\n  rank: 3\n  adapter:\n    rank: x\n",
    )
    lines = sorted(int(error.place.split(":")[1].split(" ")[0]) for error in problems(file))
    assert lines == [3, 6, 7, 9]


def test_missing_file_and_missing_folder_are_errors(tmp_path: Path) -> None:
    assert "no such recipe" in problems(tmp_path / "none.yaml")[0].text()


def test_numbers_and_words_follow_yaml_1_2(tmp_path: Path) -> None:
    recipe, _ = load_recipe(write(tmp_path, GOOD % "learning_rate: 1e-4, thinking: on, weight_decay: 1"))
    assert recipe.sft
    assert recipe.sft.learning_rate == 1e-4
    assert recipe.sft.thinking == "on"
    assert recipe.sft.weight_decay == 1.0


def test_overrides_pass_the_same_reader(tmp_path: Path) -> None:
    file = write(tmp_path, GOOD % "learning_rate: 1e-4")
    recipe, _ = load_recipe(file, ["sft.learning_rate=3e-4", "sft.adapter.rank=2", "seed=7"])
    assert recipe.sft
    assert (recipe.sft.learning_rate, recipe.sft.adapter.rank, recipe.seed) == (3e-4, 2, 7)
    assert "command line `sft.adapter.rank=x`" in problems(file, "sft.adapter.rank=x")[0].text()
    assert "section.key=value" in problems(file, "nonsense")[0].text()


@pytest.mark.parametrize(
    "text",
    [
        GOOD % "stop_after: 300 steps, adapter: {targets: [q_proj]}",
        GOOD % "batch_tokens: 400, schedule: wsd, decay: 0.2, adapter: {method: qlora, quantize: int8}",
        GOOD % "adapter: {method: full}",
        PRETRAIN
        % "phases: [{train: new_rows, embedding_learning_rate: 1e-4}, {train: lora}], adapter: {method: qlora}",
    ],
)
def test_a_recipe_is_frozen_and_survives_its_own_dump(text: str, tmp_path: Path) -> None:
    recipe, _ = load_recipe(write(tmp_path, text))
    with pytest.raises(ValueError, match="frozen"):
        recipe.seed = 1  # type: ignore[misc]
    again, notices = load_recipe(write(tmp_path, dump(recipe)))
    assert again == recipe
    assert not notices


def test_old_names_are_translated_and_said(tmp_path: Path) -> None:
    recipe, notices = load_recipe(
        write(tmp_path, GOOD % "trainer: {warmup_ratio: 0.1, group_by_length: true, adam_beta2: 0.98}, cutoff_len: 99")
    )
    assert recipe.sft
    assert (recipe.sft.warmup, recipe.sft.max_length, recipe.sft.trainer) == (0.1, 99, {"adam_beta2": 0.98})
    assert any("warmup_ratio" in notice and "warmup: 0.1" in notice for notice in notices)
    assert any("group_by_length" in notice and "padding" in notice for notice in notices)


def test_the_batch_is_converted_once_with_the_devices(tmp_path: Path) -> None:
    file = write(tmp_path, GOOD % "per_device_train_batch_size: 2, gradient_accumulation_steps: 4")
    recipe, notices = load_recipe(file, ["devices=2"])
    assert recipe.sft
    assert recipe.sft.batch_size == 16
    assert "2 x 4 x 2" in notices[0]


def test_training_arguments_are_the_installed_ones() -> None:
    from dataclasses import fields

    from transformers import TrainingArguments

    declared = {field.name for field in fields(TrainingArguments)}
    assert {*training_arguments()} <= declared
    assert len(training_arguments()) > 80
    of_some_releases = {
        "activation_checkpointing_kwargs",
        "group_by_length",
        "gradient_checkpointing",
        "activation_checkpointing",
        "train_sampling_strategy",
        "use_liger_kernel",
    }
    assert set(OWNED) - of_some_releases <= declared, "the recipe owns fields that do not exist"


def test_every_word_has_help_in_both_languages() -> None:
    for name, model in sections():
        for key, field in model.model_fields.items():
            extra = field.json_schema_extra
            assert field.description, f"{name}.{key}"
            assert isinstance(extra, dict) and extra["zh"], f"{name}.{key}"
        assert list(settings(model))
    assert "| `learning_rate` |" in to_markdown()


def test_errors_keep_the_lowest_exit_code() -> None:
    from tongwen.core.errors import DataError, ModelError

    assert SeveralErrors([ModelError("m"), DataError("d")]).exit_code == 3
    assert SeveralErrors([DataError("d"), RecipeError("r")]).exit_code == 2


def test_changes_of_a_recipe_may_stand_anywhere(tongwen: Any, tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text('{"instruction": "问", "output": "答"}\n', encoding="utf-8")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"name: a\nbase: nowhere\nprepare: {{dialogues: {data}}}\nsft: {{}}\n")
    for order in (("sft.max_length=no", "--json"), ("--json", "sft.max_length=no")):
        code, out, err = tongwen("check", recipe, *order)
        assert code == 2 and "max_length" in out + err
    with pytest.raises(SystemExit):
        tongwen("check", recipe, "--jsn", "sft.max_length=9")


@pytest.mark.parametrize(
    ("adapter", "said"),
    [
        ("{quantize: int8}", "`method: lora` does nothing with quantize"),
        ("{method: full, rank: 4, dropout: 0.1}", "dropout, rank"),
    ],
)
def test_words_without_effect_are_said(adapter: str, said: str, tmp_path: Path) -> None:
    _, notices = load_recipe(write(tmp_path, GOOD % f"adapter: {adapter}"))
    assert any(said in notice for notice in notices)


@pytest.mark.parametrize(
    ("trainer", "said"),
    [
        ("adam_beta1: x", "recipe.yaml:4 · sft.trainer.adam_beta1: 'x' is no float"),
        ("dataloader_num_workers: 1.5", "1.5 is no int"),
        ("tf32: 1", "1 is no bool | None"),
        ("adam_beta1: 1, tf32: null, project: a", ""),
    ],
)
def test_a_value_of_another_type_is_refused_at_its_line(trainer: str, said: str, tmp_path: Path) -> None:
    file = write(tmp_path, GOOD % f"trainer: {{{trainer}}}")
    if said:
        (problem,) = problems(file)
        assert said in problem.text()
    else:
        assert load_recipe(file)[1] == []


@pytest.mark.parametrize(
    ("section", "said"),
    [
        (
            "sft: {optimizer: muon, trainer: {adam_beta1: 0.5}}",
            "`optimizer: muon` does nothing with trainer.adam_beta1",
        ),
        ("sft: {trainer: {optim_args: a=1}}", "`optimizer: adamw` does nothing with trainer.optim_args"),
        ("sft: {trainer: {adam_beta1: 0.5}}", ""),
        ("pretrain: {train: full, adapter: {rank: 8}}", "`train: full` does nothing with rank"),
        ("pretrain: {train: lora+embeddings, adapter: {rank: 8}}", ""),
    ],
)
def test_words_that_nothing_reads_are_said_once(section: str, said: str, tmp_path: Path) -> None:
    """And do not stand in the resolved recipe, where they have no line of the user's."""
    file = write(tmp_path, f"name: t\nbase: b\nprepare: {{dialogues: d.jsonl, documents: t.txt}}\n{section}\n")
    recipe, notices = load_recipe(file)
    assert notices == [said] * bool(said)
    assert load_recipe(write(tmp_path, dump(recipe)))[1] == ([said] if "trainer" in said else [])
