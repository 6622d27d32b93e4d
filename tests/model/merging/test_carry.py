"""A saved model keeps the unchanged tensors of its base byte for byte."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tongwen.model.loading import load
from tongwen.model.loading.locate import locate
from tongwen.model.loading.names import names_of
from tongwen.model.merging.carry import restore_unchanged_tensors

SHAPE: dict[str, Any] = {"vocab_size": 60, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
SHAPE |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
VISION |= {"image_size": 28, "patch_size": 14}


def wrapped_base(folder: Path) -> Path:
    """A wrapped model in bf16, beside a head for further tokens that transformers does not load."""
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    config = Gemma3Config(text_config=SHAPE, vision_config=VISION, mm_tokens_per_image=4)
    Gemma3ForConditionalGeneration(config).to(torch.bfloat16).save_pretrained(folder)
    weights = load_file(folder / "model.safetensors") | {"mtp.fc.weight": torch.randn(4, 4, dtype=torch.bfloat16)}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_fp32_save_keeps_the_tower_and_unloaded_tensors(tmp_path: Path) -> None:
    base, out = wrapped_base(tmp_path / "base"), tmp_path / "out"
    place = locate(str(base))
    model = load.load_model(place, torch.float32)
    changed = "model.language_model.layers.0.mlp.up_proj.weight"
    with torch.no_grad():
        model.get_parameter(changed).add_(0.01)
    model.save_pretrained(out, max_shard_size="20KB")
    restore_unchanged_tensors(model, place, out)
    before, after = (
        {name: part for file in folder.glob("*.safetensors") for name, part in load_file(file).items()}
        for folder in (base, out)
    )
    stored = names_of(model, before).in_file(changed)
    assert set(before) == set(after) and stored is not None
    assert [name for name in before if not torch.equal(before[name].float(), after[name].float())] == [stored]
    assert after[stored].dtype == torch.float32 and after["mtp.fc.weight"].dtype == torch.bfloat16
    again = load.load_model(locate(str(out)), torch.float32)
    assert type(again) is type(model) and torch.equal(again.get_parameter(changed), model.get_parameter(changed))


def test_names_of_separate_experts_are_computed() -> None:
    from tests.conftest import tiny_moe

    model = tiny_moe()
    stored = ["model.layers.0.self_attn.q_proj.weight", "model.layers.0.mlp.experts.0.up_proj.weight", "mtp.x"]
    names = names_of(model, stored)
    assert names.in_file(stored[0]) == stored[0] and names.unused == ["mtp.x"]
    assert names.in_file("model.layers.0.mlp.experts.gate_up_proj") is None
    assert names.computed == {"model.layers.0.mlp.experts.gate_up_proj"}
