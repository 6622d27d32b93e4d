"""Every file in recipes/ is what `tongwen init` writes, is read without a notice, and runs on a tiny model."""

from __future__ import annotations

import importlib.util
import json
import random
from pathlib import Path
from typing import get_args

import pytest
import torch

import tongwen.workflows.training.documents
import tongwen.workflows.vocab_extension  # noqa: F401 (imported here, once for all children)
from tests.conftest import CORPUS, byte_level_tokenizer, dialogues, tensors, tiny_llama, tiny_moe, write_rows
from tests.export.gguf_models import make_model
from tests.launching import run_forked, run_ranks
from tongwen.commands.init import METHODS, STARTS, TRAINS, render
from tongwen.recipe.load import load_recipe
from tongwen.recipe.training import AdapterConfig

FOLDER = Path(__file__).parents[2] / "recipes"
MODERN = {"qwen3.5": "qwen3_5", "hunyuan": "hunyuan_v1_dense", "ernie-4.5": "ernie4_5", "ministral-3": "mistral3"}
MODERN |= {"gemma-3": "gemma3", "gemma-4": "gemma4", "minicpm3": "minicpm3", "deepseek-r1": "qwen2"}
MODERN |= {"gpt-oss": "gpt_oss", "glm-4.7": "glm4_moe_lite"}
NEEDS = {"zero": "deepspeed", "qlora": "bitsandbytes", "int8": "bitsandbytes"}


@pytest.fixture(scope="module")
def materials(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that is wide enough for blocks of 64 weights, another with experts, dialogues, and documents in two languages."""
    folder = tmp_path_factory.mktemp("materials")
    turn = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    tail = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    for base in (folder / "base", folder / "experts", *(folder / family for family in MODERN.values())):
        vocabulary = len(byte_level_tokenizer(base))
        if base.name == "experts":
            tiny_moe(vocab_size=vocabulary, num_experts_per_tok=2, eos_token_id=2).save_pretrained(base)
        elif base.name in MODERN.values():
            make_model(base, base.name, vocabulary)
        else:
            tiny_llama(base, vocabulary, hidden_size=64, intermediate_size=128, num_hidden_layers=1)
        tokenizer = json.loads((base / "tokenizer_config.json").read_text())
        (base / "tokenizer_config.json").write_text(json.dumps({**tokenizer, "chat_template": turn + tail}))
    write_rows(folder / "dialogues.jsonl", dialogues(24))
    write_rows(folder / "english.jsonl", [{"text": " ".join(text)} for text in texts(CORPUS[2].split(), 12)])
    (folder / "chinese.txt").write_text("\n".join("".join(text) for text in texts(list(CORPUS[0] + CORPUS[1]), 24)))
    return folder


def texts(words: list[str], count: int) -> list[list[str]]:
    """Texts that share no long stretch: what is held out does not appear in what is trained on."""
    chance = random.Random(0)
    return [chance.choices(words, k=40) for _ in range(count)]


def test_recipes_match_init() -> None:
    files = sorted(FOLDER.iterdir())
    assert [file.name for file in files] == sorted(f"{name}.yaml" for name in STARTS) and len(files) == 39
    for file in files:
        text = file.read_text(encoding="utf-8")
        assert text == render(file.stem) and "@" not in text and "¦" not in text
        what, cost, result = text.splitlines()[:3]
        assert "Needs: " in what and "tongwen plan" in cost and "OUT/" in result
        recipe, notices = load_recipe(file)
        assert not notices and recipe.training


def test_each_method_and_each_engine_has_a_recipe() -> None:
    starts = STARTS.values()
    assert {start.method for start in starts if start.stage == "sft"} == set(METHODS)
    recipes = [load_recipe(FOLDER / f"{name}.yaml")[0] for name in STARTS]
    adapters = [section.adapter for recipe in recipes for section in (recipe.sft, recipe.pretrain) if section]
    methods = set(get_args(AdapterConfig.model_fields["method"].annotation)) - {"new_rows"}  # a `pretrain` trains them
    assert {adapter.method for adapter in adapters} == methods
    for word in ("rslora", "dora", "target_parameters", "also_train"):
        assert any(getattr(adapter, word) for adapter in adapters), word
    assert {start.train for start in starts if start.stage != "sft"} == set(TRAINS) - {"lora"}
    assert {start.engine for start in starts} == {"", "ddp", "fsdp2", "zero2", "zero3"}


@pytest.mark.sample("smollm2-135m-vocab-cpu", "qwen3.5-4b-lora-24g", "qwen3-8b-full-fsdp2")
@pytest.mark.parametrize("name", STARTS)
def test_each_recipe_runs_on_a_tiny_model(name: str, materials: Path, tmp_path: Path) -> None:
    start = STARTS[name]
    for word, package in NEEDS.items():
        if (start.engine.startswith(word) or start.method == word) and importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    stage = "sft" if start.stage == "sft" else "pretrain"
    documents = f"[{materials}/chinese.txt, {{path: {materials}/english.jsonl, language: en, share: 0.2}}]"
    modern = next((family for stem, family in MODERN.items() if name.startswith(stem)), "base")
    base = materials / ("experts" if start.method == "experts" else modern)
    changes = [f"base={base}", f"out={tmp_path}", f"{stage}.precision=fp32", f"{stage}.max_length=128"]
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
        assert run_ranks(2, *command) == [0, 0]
    else:
        assert run_forked(*command) == 0
    last = tmp_path / ("merge" if start.leaves_adapter else stage)
    assert (last / "model.safetensors").is_file()
    if start.method == "experts":
        counts = json.loads((last / "manifest.json").read_text())["counts"]
        before, after = tensors(base), tensors(last)
        changed = {part for part, weight in after.items() if not torch.equal(weight, before[part])}
        assert counts == {"tensors": len(after), "changed": len(changed)} and len(changed) < len(after)
        assert any(".experts." in part for part in changed)
