"""What peft merges in memory is what its live layers compute; the merged folder, opened by transformers alone, too."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.adapters import live_logits, logits, make_adapter, merged
from tests.conftest import tensors, tiny_llama, tiny_moe

EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
MIXTURE: dict[str, dict[str, Any]] = {
    "both": {"target_parameters": EXPERTS},
    "gate_up_proj alone": {"target_parameters": EXPERTS[:1], "target_modules": ["q_proj"]},
    "down_proj alone, nothing else": {"target_parameters": EXPERTS[1:], "target_modules": []},
    "tied head": {"target_parameters": EXPERTS, "target_modules": ["q_proj", "lm_head"]},
    "tied embedding": {"target_parameters": EXPERTS[1:], "target_modules": ["embed_tokens"]},
    "kept tied": {"target_parameters": EXPERTS, "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    "token rows": {"target_parameters": EXPERTS, "target_modules": ["q_proj"], "trainable_token_indices": [3, 5]},
    "whole layer": {"modules_to_save": ["mlp"], "target_modules": ["q_proj"]},
}
UNTIED = ("tied head", "tied embedding")


def read_back(folder: Path) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    return logits(model)


@pytest.mark.parametrize("kind", MIXTURE)
def test_fused_experts_and_tied_heads_merge_like_peft(kind: str, tmp_path: Path, tongwen: Any) -> None:
    base = tmp_path / "base"
    tiny_moe(tie_word_embeddings=True).save_pretrained(base)
    make_adapter(base, tmp_path / "adapter", **MIXTURE[kind])
    out = merged(tongwen, base, [tmp_path / "adapter"], tmp_path / "out")
    assert torch.allclose(read_back(out), live_logits(base, tmp_path / "adapter"), atol=1e-5)
    before, after = tensors(base), tensors(out)
    assert after.keys() == before.keys() | ({"lm_head.weight"} if kind in UNTIED else set())
    assert torch.equal(after["model.norm.weight"], before["model.norm.weight"])
    assert json.loads((out / "manifest.json").read_text())["parity"]["judge"] == "peft"


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_base_changing_init_merges_like_peft(start: str, tmp_path: Path, tongwen: Any) -> None:
    base = tmp_path / "base"
    tiny_llama(base, 90)
    make_adapter(base, tmp_path / "adapter", init_lora_weights=start, target_modules=["q_proj", "v_proj"])
    out = merged(tongwen, base, [tmp_path / "adapter"], tmp_path / "out")
    assert torch.allclose(read_back(out), live_logits(base, tmp_path / "adapter"), atol=1e-5)


def test_dtypes_and_unused_tensors_are_kept(tmp_path: Path, tongwen: Any) -> None:
    from safetensors.torch import save_file

    base = tmp_path / "base"
    tiny_moe().to(torch.bfloat16).save_pretrained(base)
    state = tensors(base)
    state["model.layers.0.mlp.gate.weight"] = state["model.layers.0.mlp.gate.weight"].float() + 1e-4
    state["mtp.norm.weight"] = torch.ones(5, dtype=torch.float16)  # a part that transformers does not read
    save_file(state, base / "model.safetensors", metadata={"format": "pt"})
    make_adapter(base, tmp_path / "adapter", target_parameters=EXPERTS[:1], target_modules=[])
    after = tensors(merged(tongwen, base, [tmp_path / "adapter"], tmp_path / "out"))
    assert {name: tensor.dtype for name, tensor in after.items()} == {name: part.dtype for name, part in state.items()}
    changed = {name for name, tensor in after.items() if not torch.equal(tensor, state[name])}
    assert changed and all(".experts." in name and ("gate_proj" in name or "up_proj" in name) for name in changed)


def test_two_adapters_merge_in_order_like_peft(tmp_path: Path, tongwen: Any) -> None:
    base = tmp_path / "base"
    tiny_moe(tie_word_embeddings=True).save_pretrained(base)
    one, two = tmp_path / "one", tmp_path / "two"
    make_adapter(base, one, seed=1, target_parameters=EXPERTS, target_modules=[])
    make_adapter(base, two, seed=2, target_parameters=EXPERTS[1:], target_modules=["lm_head"])
    out = merged(tongwen, base, [one, two], tmp_path / "out")
    assert torch.allclose(read_back(out), live_logits(base, one, two), atol=1e-5)


@pytest.mark.parametrize("streamed", [True, False])
def test_parity_check_detects_a_wrong_merge(
    streamed: bool, tmp_path: Path, tongwen: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Streamed: a scale read wrongly by everything of ours. In memory: a tied weight changed by peft in both places."""
    from tongwen.model.adapters import chain, read

    base = tmp_path / "base"
    if streamed:
        tiny_llama(base, 90)
        scale = read._scale
        monkeypatch.setattr(read, "_scale", lambda config, target: (scale(config, target)[0] / 2, 4))
    else:
        tiny_moe(tie_word_embeddings=True).save_pretrained(base)
        monkeypatch.setattr(chain, "_separate", lambda adapted: None)
    experts = {} if streamed else {"target_parameters": EXPERTS}
    make_adapter(base, tmp_path / "adapter", target_modules=["v_proj", "lm_head"], **experts)
    code, _, err = tongwen(
        "merge", "--base", base, "--adapter", tmp_path / "adapter", "--out", tmp_path / "out", "--parity", "full"
    )
    assert code == 6, err
    assert not (tmp_path / "out").exists()
