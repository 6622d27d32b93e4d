"""Failures of the older projects: each has an explanation and existing tests; this file has those that fit nowhere else."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerFast

from tests.conftest import remade, sentencepiece_tokenizer, tensors, tiny_llama, write_recipe
from tests.laws.named_tests import exists
from tongwen.migrate.failures import failures, find


def test_all_48_failures_name_existing_tests() -> None:
    known = failures()
    assert list(known) == [f"F-{number:02}" for number in range(1, 49)]
    for one in known.values():
        assert one.tests and all(exists(test) for test in one.tests), (one.id, one.tests)
        for text in (one.symptom, one.cause, one.handling):
            assert text and not re.search("[\u4e00-\u9fff]", text.replace("是", "")), one.id


def test_doctor_explains_a_failure_by_its_number(tongwen: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    code, out, _ = tongwen("doctor", "F-02")
    assert code == 0 and "requires_grad_()" in out and "audit" in out and "test_training_step.py" in out
    assert find("f2") is find("F-02")
    code, _, err = tongwen("doctor", "F-49")
    assert code == 2 and "F-01 to F-48" in err
    monkeypatch.setenv("TONGWEN_LANG", "zh")
    code, out, _ = tongwen("doctor", "F-08", "--json")
    assert code == 0 and "443" in json.loads(out)["symptom"] and "由 peft 保存" in json.loads(out)["here"]


# -- provoked here -------------------------------------------------------------------------------------------------


def test_deepspeed_with_8_bit_is_reported(tongwen: Any) -> None:
    line = ["deepspeed", "finetune.py", "--use_lora", "--deepspeed", "run_config/deepspeed_config.json"]
    line += ["--lora_hyperparams_file", "lora_hyperparams_bloom.json", "--model_config_file", "Bloom_config.json"]
    code, out, _ = tongwen("migrate", "--json", "--", *line)
    assert code == 0
    verdicts = {one["flag"]: one for one in json.loads(out)["migrated"][0]["verdicts"]}
    assert verdicts["deepspeed"]["verdict"] == "dropped" and "dropped it silently" in verdicts["deepspeed"]["why"]


def test_deepspeed_with_int8_qlora_is_refused(chat_model: Path, tongwen: Any, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, chat_model, sft=", engine: zero2")
    recipe.write_text(recipe.read_text().replace("{rank: 4}", "{method: qlora, quantize: int8}"))
    code, _, err = tongwen("check", recipe)
    assert code == 2 and "`method: qlora` does not work with `engine: zero2`" in err and "engine: fsdp2" in err


def test_random_seed_is_replaced_with_a_notice(tongwen: Any) -> None:
    code, out, _ = tongwen("migrate", "--", "python", "finetune.py", "--base_model", "x", "--seed", "$RANDOM")
    assert code == 0
    assert re.search(r"mended +seed \$RANDOM → seed: 42", out)


def test_split_and_order_are_equal_across_processes(chat_model: Path, tmp_path: Path) -> None:
    """Independent of the salt of Python's hashes."""
    made = []
    for salt in ("1", "2"):
        recipe = write_recipe(tmp_path / salt, chat_model)
        command = [sys.executable, "-m", "tongwen", "run", str(recipe), "--only", "prepare"]
        subprocess.run(command, check=True, env={**os.environ, "PYTHONHASHSEED": salt})
        folder = tmp_path / salt / "out" / "prepare"
        made.append(
            [
                (folder / f"dialogues{part}.jsonl").read_text().replace(str(tmp_path / salt), "")
                for part in ("", ".held_out")
            ]
        )
    assert made[0] == made[1] and all(made[0])


def test_extended_tokenizer_of_any_size_is_accepted(tongwen: Any, tmp_path: Path) -> None:
    from tongwen.vocab.train import train_sentencepiece

    base = tmp_path / "base"
    base.mkdir()
    (base / "tokenizer.model").write_bytes(train_sentencepiece(["The quick brown fox."] * 9, 290, "bpe", 0))
    (tmp_path / "zh.model").write_bytes(train_sentencepiece(["今天天气很好，我们去公园。"] * 9, 280, "bpe", 0))
    tiny_llama(base, 290, tie_word_embeddings=False)
    merging = ["tokenizer", "merge", "--base", base / "tokenizer.model", "--add", tmp_path / "zh.model"]
    assert tongwen(*merging, "--out", tmp_path / "merged")[0] == 0
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"name: v\nbase: {base}\nout: {tmp_path / 'out'}\nvocab: {{tokenizer: {tmp_path / 'merged'}, pad_to_multiple: 1}}\n"
    )
    code, _, err = tongwen("run", recipe)
    assert code == 0, err
    rows = load_file(next((tmp_path / "out" / "vocab").glob("*.safetensors")))["model.embed_tokens.weight"]
    new = json.loads((tmp_path / "out" / "vocab" / "new_rows.json").read_text())
    assert len(rows) == new[-1] + 1 and new[0] == 290
    assert torch.equal(rows[:290], load_file(base / "model.safetensors")["model.embed_tokens.weight"])
    assert (tmp_path / "out" / "vocab" / "tokenizer.model").read_bytes() == (
        tmp_path / "merged" / "tokenizer.model"
    ).read_bytes()
    recipe.write_text(recipe.read_text().replace(str(tmp_path / "merged"), str(tmp_path / "zh.model")))
    code, _, err = tongwen("run", recipe, "--again")
    assert code == 4 and "differ from id" in err


def test_tokenizer_without_pad_learns_to_stop(tongwen: Any, tmp_path: Path) -> None:
    import tongwen as package

    base = tmp_path / "base"
    before = sentencepiece_tokenizer(base)
    tiny_llama(base, len(before))
    assert before.pad_token is None
    rows = [{"instruction": f"{number}", "input": "", "output": "你好。"} for number in range(24)]
    recipe = write_recipe(tmp_path, base, rows, sft=", stop_after: 30 steps")
    recipe.write_text(
        recipe.read_text().replace("template: chatml", "template: plain").replace("{rank: 4}", "{method: full}")
    )
    code, _, err = tongwen("run", recipe, "merge=null")
    assert code == 0, err
    made = tmp_path / "out" / "sft"
    assert json.loads((made / "report.json").read_text())["mask"]["stop_learned_share"] == 1.0
    after = PreTrainedTokenizerFast.from_pretrained(made)
    assert after.get_vocab() == before.get_vocab() and after.pad_token is None
    assert len(load_file(made / "model.safetensors")["model.embed_tokens.weight"]) == len(before)
    config = json.loads((made / "generation_config.json").read_text())
    assert config["eos_token_id"] == config["pad_token_id"] == before.eos_token_id == 2
    live = package.open(str(made), precision="fp32")
    assert live.chat([{"role": "user", "content": "7"}], max_new_tokens=20) == "你好。"


def test_trained_weights_are_fp32_on_an_fp16_base(chat_model: Path, tongwen: Any, tmp_path: Path) -> None:
    base = remade(chat_model, tmp_path / "half", {name: one.half() for name, one in tensors(chat_model).items()})
    code, _, err = tongwen("run", write_recipe(tmp_path, base, merge=False), "sft.stop_after=2 steps")
    assert code == 0, err
    learned = load_file(tmp_path / "out" / "sft" / "adapter_model.safetensors")
    assert {one.dtype for one in learned.values()} == {torch.float32}
    assert all(one.isfinite().all() for one in learned.values())


def test_base_model_without_template_is_refused(tongwen: Any, tmp_path: Path) -> None:
    tiny_llama(tmp_path / "base", len(sentencepiece_tokenizer(tmp_path / "base")))
    (tmp_path / "prompts.txt").write_text("你好\n", encoding="utf-8")
    asking = ["generate", "--model", tmp_path / "base", "--prompts", tmp_path / "prompts.txt", "--max-new-tokens", 2]
    code, _, err = tongwen(*asking, "--out", tmp_path / "a")
    assert code == 4 and "no chat template" in err and "chatml" in err
    code, _, err = tongwen(*asking, "--out", tmp_path / "b", "--template", "completion")
    assert code == 0, err
