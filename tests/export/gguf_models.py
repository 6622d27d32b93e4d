"""Tiny models of every family that is exported to GGUF, and llama.cpp as the judge of the file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tests.conftest import byte_level_tokenizer

SHAPE: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
SHAPE |= {"num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 256, "tie_word_embeddings": False}
SHAPE |= {"pad_token_id": None}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
LOCAL = {"num_local_experts": 4, "num_experts_per_tok": 2}
SHARED = EXPERTS | {"shared_expert_intermediate_size": 48}
ROUTED = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "n_shared_experts": 2}
ROUTED |= {"first_k_dense_replace": 1, "num_hidden_layers": 3, "routed_scaling_factor": 2.5, "norm_topk_prob": True}
LATENT = {"num_key_value_heads": 4, "kv_lora_rank": 16, "q_lora_rank": 32, "qk_nope_head_dim": 16, "head_dim": 8}
LATENT |= {"qk_rope_head_dim": 8, "v_head_dim": 24}
LATENT_EXPERTS = LATENT | ROUTED | {"n_routed_experts": 8, "num_experts_per_tok": 3}
LINEAR = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16, "num_hidden_layers": 4}
LINEAR |= {"linear_value_head_dim": 16, "layer_types": ["linear_attention"] * 3 + ["full_attention"]}
SECTIONS = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5, "mrope_section": [2, 1, 1]}
WINDOWS = {"sliding_window": 16, "num_hidden_layers": 4}
SMALL_WINDOW = {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 16, "tie_word_embeddings": True}
SCALES = {"embedding_multiplier": 3.0, "logits_scaling": 2.0, "residual_multiplier": 0.5, "attention_multiplier": 0.2}
CONVOLUTIONS = {"num_hidden_layers": 4, "layer_types": ["conv", "conv", "full_attention", "conv"]}
GEMMA4 = {"num_hidden_layers": 6, "sliding_window": 16, "global_head_dim": 32, "num_global_key_value_heads": 1}
GEMMA4 |= {"pad_token_id": 0, "tie_word_embeddings": True, "hidden_size_per_layer_input": 0}
GEMMA4 |= {"final_logit_softcapping": 5.0}
WORDS: dict[str, dict[str, Any]] = {  # of families whose configs have words of their own
    "bloom": {"hidden_size": 64, "n_layer": 2, "n_head": 4},
    "cohere": {"logit_scale": 0.5, "tie_word_embeddings": True},
    "cohere2": {**WINDOWS, "logit_scale": 0.5, "tie_word_embeddings": True},
    "deepseek_v2": LATENT_EXPERTS | {"norm_topk_prob": False},
    "deepseek_v3": {**LATENT_EXPERTS, "n_group": 4, "topk_group": 2},
    "dots1": {**ROUTED, "num_key_value_heads": 4},
    "ernie4_5_moe": {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 32, "num_hidden_layers": 3},
    "exaone4": {"sliding_window": None, "sliding_window_pattern": None, "layer_types": ["full_attention"] * 2},
    "exaone_moe": EXPERTS | WINDOWS | {"num_shared_experts": 1, "routed_scaling_factor": 2.5},
    "gemma": {"head_dim": 32, "tie_word_embeddings": True},
    "gemma2": {**SMALL_WINDOW, "num_hidden_layers": 4, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 5.0},
    "gemma3_text": {**SMALL_WINDOW, "num_hidden_layers": 7},
    "gemma4_text": GEMMA4,
    "glm4_moe": {**ROUTED, "use_qk_norm": True, "attention_bias": True},
    "glm4_moe_lite": {**LATENT_EXPERTS, "head_dim": 24},
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256, "bos_token_id": 1, "eos_token_id": 2},
    "gpt_neox": {"num_key_value_heads": 4},
    "gpt_oss": LOCAL | WINDOWS | {"intermediate_size": 64},
    "granite": SCALES,
    "granitemoe": LOCAL | SCALES,
    "granitemoeshared": LOCAL | SCALES | {"shared_intermediate_size": 48},
    "hunyuan_v1_moe": {"num_experts": 4, "moe_topk": [2, 2], "num_shared_expert": [1, 1]}
    | {"moe_intermediate_size": [96, 96]},
    "lfm2": {**CONVOLUTIONS, "block_auto_adjust_ff_dim": False},
    "lfm2_moe": {**CONVOLUTIONS, **EXPERTS, "num_dense_layers": 1, "tie_word_embeddings": True},
    "llama4_text": {"num_local_experts": 4, "num_experts_per_tok": 1, "intermediate_size_mlp": 128}
    | {"num_hidden_layers": 4, "interleave_moe_layer_step": 2},
    "minicpm3": {**LATENT, "v_head_dim": 16},
    "minimax_m2": LOCAL,
    "mixtral": LOCAL,
    "olmo3": WINDOWS,
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2, "num_key_value_heads": 4},
    "qwen2_moe": SHARED,
    "qwen3_5_moe_text": SHARED | LINEAR | {"rope_parameters": SECTIONS},
    "qwen3_5_text": LINEAR | {"rope_parameters": SECTIONS},
    "qwen3_moe": {**EXPERTS, "moe_intermediate_size": 64, "norm_topk_prob": True},
    "qwen3_next": SHARED | LINEAR,
    "smollm3": {"num_hidden_layers": 5},  # of which the fourth has no rotations
}
SEEDS = {
    "mistral3": 3,
    "dots1": 2,
    "starcoder2": 2,
    "ernie4_5_moe": 3,
    "gpt_oss": 3,
    "olmo2": 2,
    "olmo3": 2,
    "lfm2": 2,
}  # with other seeds they end their answers early
TOWER = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
TOWER |= {"image_size": 56, "patch_size": 14}
QWEN_TOWER = {"depth": 1, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 64}
WRAPPED: dict[str, tuple[str, dict[str, Any]]] = {  # the family of the text part, the config of the rest
    "gemma3": ("gemma3_text", {"vision_config": TOWER, "mm_tokens_per_image": 4}),
    "gemma4": ("gemma4_text", {"vision_config": TOWER | {"head_dim": 16}, "audio_config": None}),
    "mistral3": ("ministral3", {"vision_config": TOWER | {"model_type": "pixtral", "head_dim": 16}}),
    "qwen3_5": ("qwen3_5_text", {"vision_config": QWEN_TOWER | {"num_position_embeddings": 16}}),
    "qwen3_5_moe": ("qwen3_5_moe_text", {"vision_config": QWEN_TOWER | {"num_position_embeddings": 16}}),
}


def make_model(folder: Path, family: str, rows: int, **more: Any) -> Any:
    """Save a tiny model whose weights are all of some size. `more` goes into its config."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    text, rest = WRAPPED.get(family, (family, {}))
    shape: dict[str, Any] = {} if family in ("bloom", "gpt2") else SHAPE
    words = {"vocab_size": rows, **shape, **WORDS.get(text, {}), **more}
    if text == "gemma4_text":
        words["vocab_size_per_layer_input"] = rows
    if family in WRAPPED:
        tied = words["tie_word_embeddings"]
        config = AutoConfig.for_model(
            family, text_config={"model_type": text, **words}, tie_word_embeddings=tied, **rest
        )
    else:
        config = AutoConfig.for_model(family, **words)
    torch.manual_seed(SEEDS.get(family, 1))
    model = (AutoModelForImageTextToText if family in WRAPPED else AutoModelForCausalLM).from_config(config)
    model = model.float().eval()
    with torch.no_grad():
        for part in model.parameters():
            part.add_(torch.randn_like(part) * 0.08)
        for name, part in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                part.add_(torch.randn_like(part) * 0.08)
    model.save_pretrained(folder)
    return model


def convert(tongwen: Any, model: Path, out: Path, kind: str) -> Path:
    code, _, err = tongwen("convert", model, "--to", "gguf", "--quantize", kind, "--out", out)
    assert code == 0, err
    (file,) = out.glob("*.gguf")
    return file


def check_greedy(there: Any, model: Any, ids: list[int], count: int) -> None:
    """The same tokens, up to where llama.cpp stops of itself."""
    found, expected = there.greedy(ids, count), list(ids)
    with torch.no_grad():
        for _ in range(count):
            expected.append(int(model(torch.tensor([expected])).logits[0, -1].argmax()))
    assert found == expected[len(ids) : len(ids) + len(found)]
    assert len(found) >= 8


def check_refused(folder: Path, family: str, more: dict[str, Any], message: str, tongwen: Any) -> None:
    """A tiny model with these settings gives no GGUF file, and the message says which setting is why."""
    model, out = folder / "model", folder / "out"
    make_model(model, family, len(byte_level_tokenizer(model)), **more)
    code, _, err = tongwen("convert", model, "--to", "gguf", "--out", out)
    assert code == 4 and message in err and "--to hf" in err and not out.exists()
