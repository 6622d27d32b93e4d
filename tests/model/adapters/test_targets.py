"""Which weights an adapter is attached to: every linear layer of the text part, and nothing that text never reaches."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tongwen.core.errors import ModelError
from tongwen.model.adapters.attach import make_trainable
from tongwen.recipe.training import AdapterConfig

SHAPE: dict[str, Any] = {"vocab_size": 60, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
SHAPE |= {"num_attention_heads": 4, "num_key_value_heads": 4, "pad_token_id": None}
LATENT = {"kv_lora_rank": 16, "q_lora_rank": 16, "qk_nope_head_dim": 8, "head_dim": 8, "qk_rope_head_dim": 8}
LATENT |= {"v_head_dim": 8, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1}
LATENT |= {"moe_intermediate_size": 24, "first_k_dense_replace": 1, "n_shared_experts": 1}
VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
VISION |= {"image_size": 28, "patch_size": 14}


def build(kind: str, **config: Any) -> Any:
    from transformers import AutoConfig

    from tongwen.model.loading.architecture import auto_class

    torch.manual_seed(0)
    made = AutoConfig.for_model(kind, **config)
    return auto_class(made).from_config(made)


def wrapped() -> Any:
    return build("gemma3", text_config=SHAPE | {"head_dim": 8}, vision_config=VISION, mm_tokens_per_image=4)


def adapted_modules(model: Any, **settings: Any) -> tuple[set[str], list[str]]:
    """Return (the modules with an adapter, the notices)."""
    adapted = make_trainable(model, AdapterConfig(rank=2, **settings), [])
    names = {name.split(".lora_A.")[0] for name, _ in adapted.model.named_parameters() if ".lora_A." in name}
    return {name.removeprefix("base_model.model.") for name in names}, adapted.notices


def test_all_linear_on_moe_skips_only_the_router() -> None:
    modules, notices = adapted_modules(build("deepseek_v3", **SHAPE, **LATENT))
    wanted = {
        "model.layers.0.mlp.gate_proj",
        "model.layers.1.mlp.shared_experts.down_proj",
        "model.layers.1.mlp.experts",
    }
    assert wanted <= modules
    assert not [name for name in modules if name.endswith(("mlp.gate", "lm_head"))]
    assert any("covers 2 fused" in notice for notice in notices)


def test_unsupported_layers_are_skipped_with_a_notice() -> None:
    modules, notices = adapted_modules(build("deepseek_v3", **SHAPE, **LATENT), dropout=0.1)
    assert "model.layers.0.self_attn.o_proj" in modules and "model.layers.0.mlp.gate_proj" not in modules
    assert any("does not support dropout" in notice for notice in notices)


def test_layer_used_without_forward_is_skipped() -> None:
    model = build("mamba", vocab_size=60, hidden_size=32, num_hidden_layers=1, state_size=4, pad_token_id=None)
    modules, notices = adapted_modules(model)
    assert "backbone.layers.0.mixer.in_proj" in modules and "backbone.layers.0.mixer.dt_proj" not in modules
    assert any("dt_proj" in notice and "no gradient" in notice for notice in notices)


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "v_proj"]])
def test_multimodal_model_is_adapted_only_in_its_text_part(targets: Any) -> None:
    modules, _ = adapted_modules(wrapped(), targets=targets)
    assert modules and all(name.startswith("model.language_model.layers.") for name in modules)
    assert any("vision_tower" in name and name.endswith("q_proj") for name, _module in wrapped().named_modules())


def test_full_training_of_multimodal_freezes_the_tower() -> None:
    adapted = make_trainable(wrapped(), AdapterConfig(method="full"), [])
    learned = {name for name, part in adapted.model.named_parameters() if part.requires_grad}
    assert "model.language_model.layers.0.mlp.up_proj.weight" in learned
    assert not [name for name in learned if "vision" in name or "projector" in name]


def test_excluded_names_get_no_adapter() -> None:
    modules, _ = adapted_modules(build("deepseek_v3", **SHAPE, **LATENT), exclude=["experts", "layers.0"])
    assert "model.layers.1.mlp.shared_experts.up_proj" in modules
    assert not [name for name in modules if name.startswith("model.layers.0.") or name.endswith(".experts")]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"exclude": ["no_such"]}, "no module named 'no_such'"),
        ({"targets": ["fc1"]}, "text never reaches 'fc1'"),
        ({"targets": ["nowhere"]}, "no module named 'nowhere'"),
        ({"exclude": ["layers"]}, "no weight is left"),
    ],
)
def test_unknown_names_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        make_trainable(wrapped(), AdapterConfig(rank=2, **settings), [])
