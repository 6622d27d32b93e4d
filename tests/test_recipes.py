"""Every file in recipes/ is what `tongwen init` writes, is read without a notice, and runs on a tiny model."""

from __future__ import annotations

import importlib.util
import json
import random
from pathlib import Path
from typing import Any

import pytest

import tongwen.stages.pretrain
import tongwen.stages.vocab  # noqa: F401 (imported here, once for all children)
from tests.conftest import CORPUS, byte_level_tokenizer, dialogues, tiny_llama, write_rows
from tests.launching import in_a_child, launched
from tongwen.recipe.load import load
from tongwen.stages.init import METHODS, STARTS, TRAINS, render

FOLDER = Path(__file__).parents[1] / "recipes"
NEEDS = {"zero": "deepspeed", "qlora": "bitsandbytes", "int8": "bitsandbytes"}


def distinct() -> list[str]:
    """One name for each way to train and each engine: what is left when model, rank, rates and lengths are set aside."""
    found: dict[Any, str] = {}
    for name, start in STARTS.items():
        found.setdefault((start.stage, start.method, start.template, start.train, start.engine, start.offload), name)
    return list(found.values())


@pytest.fixture(scope="module")
def materials(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that is wide enough for blocks of 64 weights, dialogues, and documents in two languages."""
    folder = tmp_path_factory.mktemp("materials")
    base = folder / "base"
    tiny_llama(base, len(byte_level_tokenizer(base)), hidden_size=64, intermediate_size=128, num_hidden_layers=1)
    tokenizer = json.loads((base / "tokenizer_config.json").read_text())
    turn = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    tail = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    (base / "tokenizer_config.json").write_text(json.dumps({**tokenizer, "chat_template": turn + tail}))
    write_rows(folder / "dialogues.jsonl", dialogues(24))
    write_rows(folder / "english.jsonl", [{"text": " ".join(text)} for text in texts(CORPUS[2].split(), 12)])
    (folder / "chinese.txt").write_text("\n".join("".join(text) for text in texts(list(CORPUS[0] + CORPUS[1]), 24)))
    return folder


def texts(words: list[str], count: int) -> list[list[str]]:
    """Texts that share no long stretch: what is held out does not appear in what is trained on."""
    chance = random.Random(0)
    return [chance.choices(words, k=40) for _ in range(count)]


def test_the_recipes_are_those_of_init() -> None:
    files = sorted(FOLDER.iterdir())
    assert [file.name for file in files] == sorted(f"{name}.yaml" for name in STARTS) and len(files) == 27
    for file in files:
        text = file.read_text(encoding="utf-8")
        assert text == render(file.stem) and "@" not in text and "¦" not in text
        what, cost, result = text.splitlines()[:3]
        assert "Needs: " in what and "tongwen plan" in cost and "OUT/" in result
        recipe, notices = load(file)
        assert not notices and recipe.training


def test_each_method_and_each_engine_has_a_recipe() -> None:
    starts = STARTS.values()
    assert {start.method for start in starts if start.stage == "sft"} == set(METHODS)
    assert {start.train for start in starts if start.stage != "sft"} == set(TRAINS) - {"lora"}
    assert {start.engine for start in starts} == {"", "ddp", "fsdp2", "zero2", "zero3"}


@pytest.mark.parametrize("name", distinct())
def test_each_recipe_runs_on_a_tiny_model(name: str, materials: Path, tmp_path: Path) -> None:
    start = STARTS[name]
    for word, package in NEEDS.items():
        if (start.engine.startswith(word) or start.method == word) and importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    stage = "sft" if start.stage == "sft" else "pretrain"
    documents = f"[{materials}/chinese.txt, {{path: {materials}/english.jsonl, language: en, share: 0.2}}]"
    changes = [f"base={materials / 'base'}", f"out={tmp_path}", f"{stage}.precision=fp32", f"{stage}.max_length=128"]
    changes += [f"{stage}.samples=1", f"{stage}.stop_after=2 steps", "devices=1", "prepare.held_out=4"]
    if stage == "sft":
        changes += [f"prepare.dialogues={materials}/dialogues.jsonl", "sft.batch_size=4"]
    else:
        changes += [f"prepare.documents={documents}", "pretrain.batch_tokens=256", "pretrain.evaluate_every=1"]
    if start.stage == "vocab":
        changes += ["vocab.pieces=8", "vocab.measure_bits=false"]
    if start.train == "phases":
        changes.append(
            "pretrain.phases=[{train: new_rows, stop_after: 1 step}, {train: lora+embeddings, stop_after: 1 step}]"
        )
    command = ("run", FOLDER / f"{name}.yaml", *changes)
    if start.engine:
        assert launched(2, *command) == [0, 0]
    else:
        assert in_a_child(*command) == 0
    last = tmp_path / ("merge" if start.leaves_adapter else stage)
    assert (last / "model.safetensors").is_file() and (last / "manifest.json").is_file()
