"""A folded adapter is the live adapter, on the base that it was trained on and on no other."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.conftest import tensors
from tongwen.errors import ArtifactError, ModelError
from tongwen.model.fingerprint import fingerprint_model, fingerprint_state
from tongwen.model.fold import fold
from tongwen.model.load import Place

KINDS: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "embedding": {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    "token rows": {"trainable_token_indices": {"embed_tokens": [1, 5]}},
    "patterns": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"mlp.*up_proj": 3}},
}


def make_adapter(base: Path, folder: Path, **options: Any) -> Any:
    """A peft model with disturbed adapter weights, saved; returns it live."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base)
    adapted = get_peft_model(
        model, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM", **options)
    )
    torch.manual_seed(3)
    with torch.no_grad():
        for part in adapted.parameters():
            if part.requires_grad:
                part.add_(torch.randn_like(part) * 0.05)
    adapted.save_pretrained(str(folder))
    return adapted


@pytest.mark.parametrize("kind", KINDS)
def test_folded_is_live(kind: str, chat_model: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    live = make_adapter(chat_model, tmp_path / "adapter", **KINDS[kind]).eval()
    out = tmp_path / "out"
    out.mkdir()
    counts = fold(Place("", str(chat_model)), tmp_path / "adapter", out, None, lambda done: None)
    assert counts["changed"] >= 14
    merged, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    ids = torch.arange(40)[None]
    with torch.no_grad():
        assert torch.allclose(merged(ids).logits, live(ids).logits, atol=2e-6)


def test_bf16_is_rounded_once(chat_model: Path, tmp_path: Path) -> None:
    make_adapter(chat_model, tmp_path / "adapter")
    for name, dtype in (("a", None), ("b", torch.bfloat16)):
        (tmp_path / name).mkdir()
        fold(Place("", str(chat_model)), tmp_path / "adapter", tmp_path / name, dtype, lambda done: None)
    full, half = tensors(tmp_path / "a"), tensors(tmp_path / "b")
    assert all(torch.equal(half[name], full[name].to(torch.bfloat16)) for name in full)
    assert json.loads((tmp_path / "b" / "config.json").read_text())["dtype"] == "bfloat16"


def _edit(folder: Path, change: Any) -> None:
    file = folder / "adapter_model.safetensors"
    state = load_file(file)
    change(state)
    save_file(state, file)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda state: [tensor.zero_() for name, tensor in state.items() if "lora_B" in name], "never trained"),
        (lambda state: state.clear(), "empty"),
        (lambda state: state.pop(next(name for name in state if "lora_A" in name)), "half of an A/B pair"),
        (
            lambda state: state.update(
                {
                    "base_model.model.model.layers.9.self_attn.q_proj.lora_A.weight": torch.ones(4, 32),
                    "base_model.model.model.layers.9.self_attn.q_proj.lora_B.weight": torch.ones(32, 4),
                }
            ),
            "layers.9",
        ),
        (lambda state: state.update({"base_model.model.model.prompt": torch.ones(3)}), "cannot be folded"),
        (
            lambda state: state.update({next(iter(state)): torch.full_like(state[next(iter(state))], float("nan"))}),
            "NaN",
        ),
        (
            lambda state: state.update(
                {
                    name: torch.ones(tensor.shape[0], 9)
                    for name, tensor in state.items()
                    if name.endswith("0.mlp.up_proj.lora_A.weight")
                }
            ),
            "shape",
        ),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused(
    change: Any, words: str, chat_model: Path, tmp_path: Path, tongwen: Any
) -> None:
    make_adapter(chat_model, tmp_path / "adapter")
    _edit(tmp_path / "adapter", change)
    code, _, err = tongwen("merge", "--base", chat_model, "--adapter", tmp_path / "adapter", "--out", tmp_path / "out")
    assert code in (4, 6) and words in err, err
    assert not (tmp_path / "out").exists()


def test_merge_command_and_wrong_bases(chat_model: Path, other_model: Path, tmp_path: Path, tongwen: Any) -> None:
    from tests.conftest import write_recipe

    recipe = write_recipe(tmp_path, chat_model, sft=", stop_after: 2 steps")
    assert tongwen("run", recipe)[0] == 0
    adapter = tmp_path / "out" / "sft"
    code, _, err = tongwen("merge", "--base", other_model, "--adapter", adapter, "--out", tmp_path / "wrong")
    assert code == 4
    for folder in (chat_model, other_model):
        assert str(fingerprint_model(Place("", str(folder))))[:12] in err, "both fingerprints are named"
    assert not (tmp_path / "wrong").exists()
    with pytest.raises(ArtifactError, match="another base"):
        __import__("tongwen").open(str(other_model), adapters=[str(adapter)])
    assert (
        tongwen("merge", "--base", other_model, "--adapter", adapter, "--out", tmp_path / "forced", "--force")[0] == 0
    )
    assert json.loads((tmp_path / "forced" / "manifest.json").read_text())["forced"] is True
    moved = tmp_path / "a copy of the base"
    shutil.copytree(chat_model, moved)
    assert tongwen("merge", "--base", moved, "--adapter", adapter, "--out", tmp_path / "right")[0] == 0
    assert all(
        torch.equal(tensor, tensors(tmp_path / "out" / "merge")[name])
        for name, tensor in tensors(tmp_path / "right").items()
    )
    code, _, err = tongwen("merge", "--base", chat_model, "--adapter", adapter, "--out", tmp_path / "right")
    assert code == 2 and "--again" in err


def test_a_fingerprint_is_of_tensors_not_of_files(chat_model: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(chat_model)
    model.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    one = fingerprint_model(Place("", str(chat_model)))
    assert fingerprint_model(Place("", str(tmp_path / "sharded"))) == one
    state = load_file(chat_model / "model.safetensors")
    assert fingerprint_state(state) == one
    state["model.norm.weight"][0] += 1e-7
    assert fingerprint_state(state) != one


def test_an_adapter_of_another_kind_is_named(chat_model: Path, tmp_path: Path) -> None:
    make_adapter(chat_model, tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "peft_type": "PREFIX_TUNING"}))
    with pytest.raises(ModelError, match="PREFIX_TUNING"):
        fold(Place("", str(chat_model)), tmp_path / "adapter", tmp_path, None, lambda done: None)


def test_an_embedding_trained_apart_from_its_tied_head_is_refused(chat_model: Path, tmp_path: Path) -> None:
    make_adapter(chat_model, tmp_path / "adapter", modules_to_save=["embed_tokens"])
    with pytest.raises(ArtifactError, match="apart from the other half"):
        fold(Place("", str(chat_model)), tmp_path / "adapter", tmp_path, None, lambda done: None)
