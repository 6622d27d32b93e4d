"""Each family does what the table of families promises, at tiny size, through the same commands."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import byte_level_tokenizer, dialogues, write_recipe, write_rows
from tests.model.chatglm.chatglm_base import chatglm_folder
from tongwen.core.model_families import FAMILIES

SHAPE: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
SHAPE |= {"num_key_value_heads": 2, "max_position_embeddings": 256, "pad_token_id": None, "head_dim": 16}
LATENT = {"num_key_value_heads": 4, "kv_lora_rank": 16, "q_lora_rank": 32, "qk_nope_head_dim": 16, "head_dim": 8}
LATENT |= {"qk_rope_head_dim": 8, "v_head_dim": 16, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1}
LATENT |= {"moe_intermediate_size": 32, "first_k_dense_replace": 1, "n_shared_experts": 1, "topk_group": 1}
SHAPES: dict[str, dict[str, Any]] = {
    "bloom": {"hidden_size": 64, "n_layer": 2, "n_head": 4},
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256},
    "qwen3_moe": SHAPE | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    "deepseek_v2": SHAPE | LATENT,
    "deepseek_v3": SHAPE | LATENT,
}

PRETRAIN = """pretrain: {phases: [{train: full, stop_after: 2 steps}], max_length: 64, batch_size: 2, samples: 0, precision: fp32}
"""


def texts(count: int) -> list[str]:
    """Return texts that are all different."""
    return ["".join(chr(0x4E00 + (97 * row + 13 * place) % 3000) for place in range(30)) for row in range(count)]


def family_folder(folder: Path, family: str, ice: Path) -> Path:
    """A tiny model of a family with a tokenizer."""
    from transformers import AutoConfig, AutoModelForCausalLM

    if family == "chatglm":
        return chatglm_folder(folder, ice)
    size = len(byte_level_tokenizer(folder)) + 12
    torch.manual_seed(0)
    shape = SHAPES.get(family, SHAPE) | {"vocab_size": size, "bos_token_id": 1, "eos_token_id": 2}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **shape))
    with torch.no_grad():
        for part in model.parameters():
            part.add_(torch.randn_like(part) * 0.02)
    model.save_pretrained(str(folder))
    return folder


@pytest.mark.sample("qwen3-lora", "chatglm-lora", "llama-qlora")
@pytest.mark.parametrize("method", ["lora", "qlora"])
@pytest.mark.parametrize("family", FAMILIES)
def test_family_trains_and_merges(family: str, method: str, small_ice: Path, tmp_path: Path, tongwen: Any) -> None:
    """Train in full on plain text, then an adapter on dialogues; or an adapter on the quantised base."""
    if method == "qlora":
        pytest.importorskip("bitsandbytes")
    facts, base = FAMILIES[family], family_folder(tmp_path / "base", family, small_ice)
    recipe = write_recipe(tmp_path, base, rows=dialogues(10), sft=", stop_after: 4 steps")
    text = recipe.read_text().replace("rank: 4", f"rank: 4, method: {method}")
    text = text.replace("template: chatml", "template: own") if family == "chatglm" else text
    if method == "lora" and not facts.dialogues_only:
        (tmp_path / "text.txt").write_text("\n\n".join(texts(12)), encoding="utf-8")
        text = text.replace("prepare: {", f"prepare: {{documents: {tmp_path / 'text.txt'}, ") + PRETRAIN
    recipe.write_text(text)
    code, out, err = tongwen("run", recipe)
    assert code == 0, err
    output = out + err
    assert ("documents in a pack cannot see each other" in output) == (facts.padded is None)
    assert ("trains in padded batches" in output) == (facts.padded is not None)
    assert ("peft merges the whole model in memory" in output) == facts.experts
    report = json.loads((tmp_path / "out" / "sft" / "report.json").read_text())
    assert report["held_out"]["bits_per_byte"]["after"] < report["held_out"]["bits_per_byte"]["before"]
    base = tmp_path / "out" / "pretrain" if PRETRAIN in text else base
    check_merged(base, tmp_path / "out" / "sft", tmp_path / "out" / "merge")
    prompts = write_rows(tmp_path / "prompts.jsonl", [{"prompt": "问题1：你好吗？"}])
    code, _, err = tongwen(
        "generate", "--model", tmp_path / "out" / "merge", "--prompts", prompts, "--out", tmp_path / "o"
    )
    assert code == 0, err


@pytest.mark.parametrize("family", FAMILIES)
def test_default_targets_exist_in_the_model(family: str, small_ice: Path, tmp_path: Path) -> None:
    from tongwen.model.loading.architecture import build_on_meta, load_config
    from tongwen.model.loading.locate import locate

    model = build_on_meta(load_config(locate(str(family_folder(tmp_path, family, small_ice)))))
    assert set(FAMILIES[family].targets) <= {name.split(".")[-1] for name, _ in model.named_modules()}


def check_merged(base: Path, adapter: Path, merged: Path) -> None:
    """The merged folder computes the same as peft with adapter and base, also after quantised training."""
    from peft import PeftModel

    from tongwen.model.loading import load
    from tongwen.model.loading.locate import locate

    ids = torch.tensor([[5, 9, 30, 7, 200, 41]])
    one, other, untrained = (load.load_model(locate(str(place)), torch.float32) for place in (base, merged, base))
    with torch.no_grad():
        live = PeftModel.from_pretrained(one, str(adapter)).eval()(ids).logits
        torch.testing.assert_close(other.eval()(ids).logits, live, rtol=0, atol=2e-4)
        assert float((live - untrained.eval()(ids).logits).abs().max()) > 1e-3


def test_max_length_beyond_the_position_table_is_refused(small_ice: Path, tmp_path: Path, tongwen: Any) -> None:
    base = family_folder(tmp_path / "base", "gpt2", small_ice)
    rows = [{"instruction": "长", "input": "", "output": "龘靐" * 100}, *dialogues(8)]
    recipe = write_recipe(tmp_path, base, rows=rows, merge=False)
    recipe.write_text(recipe.read_text().replace("max_length: 256", "max_length: 1000"))
    code, _, err = tongwen("run", recipe)
    assert code == 2 and "a table of only 256 positions" in err and "max_length: 256" in err


def test_prefix_model_refuses_plain_text(small_ice: Path, tmp_path: Path, tongwen: Any) -> None:
    base = family_folder(tmp_path / "base", "chatglm", small_ice)
    (tmp_path / "text.txt").write_text("\n\n".join(texts(12)), encoding="utf-8")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"name: t\nbase: {base}\nout: {tmp_path / 'out'}\nprepare: {{documents: {tmp_path / 'text.txt'}}}\npretrain: {{}}\n"
    )
    code, _, err = tongwen("run", recipe)
    assert code == 2 and "prefix language model" in err and "sft" in err
