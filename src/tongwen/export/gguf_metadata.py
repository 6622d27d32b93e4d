"""Write a GGUF file's metadata from a model's config, and reject configs that llama.cpp would compute differently.

The keys come from llama.cpp's conversion/*.py, the limits from its src/models/*.cpp. llama.cpp hard-codes some values
for a family (no rotations in every fourth layer, a scale of the queries); a config with other values raises an error.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from tongwen.core.errors import ModelError
from tongwen.core.i18n import _
from tongwen.core.model_families import FAMILIES

Config = Mapping[str, Any]

ARCHITECTURES = {name: family.gguf for name, family in FAMILIES.items() if family.gguf}
FILE_TYPES = {"f32": "ALL_F32"}  # all others are MOSTLY_...
WINDOW_IGNORED = ("mistral", "phi3")  # llama.cpp ignores these families' sliding window


def check_family(kind: str) -> None:
    """Raise ModelError for a family whose GGUF has not been verified."""
    if kind not in ARCHITECTURES:
        raise ModelError(
            _("writing GGUF is not supported for the family {kind!r}").format(kind=kind),
            place="--to gguf",
            remedy=_("verified for {architectures}").format(architectures=_(", ").join(ARCHITECTURES)),
        )


def check_config(config: Config) -> None:
    """Raise ModelError if llama.cpp would compute another model. config: from `gguf_layout.with_llama_keys`."""
    check_family(str(config["model_type"]))
    for key, expected in _expected(config).items():
        found = config.get(key)
        if (found or None) != (expected or None):
            shown = json.dumps(found, ensure_ascii=False)
            raise _mismatch(f"config.json: {key}: {shown}", json.dumps(expected, ensure_ascii=False))
    rope, kind = rotation(config), str(config["model_type"])
    rope_type = rope.get("rope_type") or rope.get("type") or "default"
    if rope_type not in _rotations(kind):
        raise ModelError(
            _("llama.cpp does not support {how!r} rotary positions for {kind}").format(how=rope_type, kind=kind),
            place="rope_scaling",
            remedy="--to hf",
        )
    for key, expected in _expected_of_yarn(config, rope).items() if rope_type == "yarn" else ():
        if rope.get(key) != expected:
            raise _mismatch(f"rope_scaling: {key}: {rope.get(key)}", str(expected))


def _mismatch(place: str, expected: str) -> ModelError:
    return ModelError(
        _("llama.cpp would compute a different model: it assumes {expected} here").format(expected=expected),
        place=place,
        remedy="--to hf",
    )


def _expected(config: Config) -> dict[str, Any]:
    """Return the config values that llama.cpp hard-codes for a family."""
    layers, kind = int(config["num_hidden_layers"]), str(config["model_type"])
    if kind == "qwen3_moe":
        return {"norm_topk_prob": True}
    if kind == "gpt_neox":
        return {"attention_bias": True, "tie_word_embeddings": False}
    if kind == "gemma":
        return {"tie_word_embeddings": True, **_GEMMA}
    if kind == "gemma2":
        usual = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
        caps = {key: config.get(key) or cap for key, cap in usual.items()}
        tied = {"tie_word_embeddings": True, "query_pre_attn_scalar": _query_scale(config, layers == 46)}
        return {**_GEMMA, **caps, **tied, "layer_types": _windows(layers, 2)}
    if kind == "gemma3_text":
        scale = {"query_pre_attn_scalar": _query_scale(config, layers == 62), "attn_logit_softcapping": None}
        return {**_GEMMA, **scale, "layer_types": _windows(layers, 6)}
    if kind == "smollm3":
        rotated = [int((layer + 1) % 4 != 0) for layer in range(layers)]
        return {"no_rope_layers": rotated, **dict.fromkeys(("attention_bias", "mlp_bias", "use_sliding_window"), False)}
    if kind == "deepseek_v3":
        lite = {"q_lora_rank": None} if layers in (26, 27) else {}  # by its layers, as DeepSeek-V2-Lite
        return {"attention_bias": False, "rope_interleave": True, **lite}
    return {}


_GEMMA = {"attention_bias": False, "use_bidirectional_attention": False}


def _expected_of_yarn(config: Config, rope: Config) -> dict[str, Any]:
    """Return the YaRN parameters that llama.cpp hard-codes. DeepSeek sets its queries' scale by `mscale`; for others
    llama.cpp computes it."""
    usual = 1.0 if _latent(config) else 0.1 * math.log(float(rope["factor"])) + 1
    fixed = {"beta_fast": 32, "beta_slow": 1, "truncate": True, "attention_factor": usual}
    checked = {key: expected for key, expected in fixed.items() if rope.get(key) is not None}
    keys = ("mscale", "mscale_all_dim")
    return checked | ({one: rope.get(other) or 1.0 for one, other in (keys, keys[::-1])} if _latent(config) else {})


def _windows(layers: int, every: int) -> list[str]:
    return ["sliding_attention" if (layer + 1) % every else "full_attention" for layer in range(layers)]


def _query_scale(config: Config, largest: bool) -> int:
    """Return Gemma's query scale. llama.cpp recognises the largest model of each generation by its layer count."""
    return int(config["hidden_size"]) // int(config["num_attention_heads"]) if largest else head_width(config)


def _rotations(kind: str) -> tuple[str, ...]:
    if kind == "phi3":
        return "default", "longrope"
    if kind == "gemma3_text":
        return "default", "linear"
    if ARCHITECTURES[kind] == "deepseek2":  # llama.cpp scales the queries by any factor, as for YaRN
        return "default", "yarn"
    return ("default", "linear", "yarn", *(("llama3",) if ARCHITECTURES[kind] == "llama" else ()))


def rotation(config: Config) -> dict[str, Any]:
    """Return the rotary parameters of the layers with full attention."""
    found: dict[str, Any] = config.get("rope_parameters") or config.get("rope_scaling") or {}
    return dict(found.get("full_attention", found))


def extra_tensors(config: Config) -> dict[str, Any]:
    """Return tensors that only GGUF has: the factors by which LLaMA 3.1 and long-context Phi-3 slow each rotation."""
    rope = rotation(config)
    if "long_factor" in rope:
        factors = {"rope_factors_long.weight": "long_factor", "rope_factors_short.weight": "short_factor"}
        return {gguf_name: np.array(rope[key], np.float32) for gguf_name, key in factors.items()}
    if (rope.get("rope_type") or rope.get("type")) != "llama3":
        return {}
    width, old = head_width(config), float(rope["original_max_position_embeddings"])
    low, high, factor = float(rope["low_freq_factor"]), float(rope["high_freq_factor"]), float(rope["factor"])
    waves = 2 * math.pi * _theta(config) ** (np.arange(0, width, 2) / width)
    smooth = np.clip((old / waves - low) / (high - low), 0, 1)
    return {"rope_freqs.weight": (1 / ((1 - smooth) / factor + smooth)).astype(np.float32)}


def head_width(config: Config) -> int:
    return int(config.get("head_dim") or int(config["hidden_size"]) // int(config["num_attention_heads"]))


def _latent(config: Config) -> bool:
    """Whether keys and values are stored compressed, as DeepSeek does."""
    return ARCHITECTURES[str(config["model_type"])] == "deepseek2"


def _theta(config: Config) -> float:
    return float(config.get("rope_theta") or rotation(config).get("rope_theta") or 10000.0)


def add_metadata(writer: Any, config: Config, name: str, rows: int, kind: str) -> None:
    """Write the metadata that llama.cpp needs to build the model. rows: of the embedding; kind: dtype."""
    import gguf

    family, heads = str(config["model_type"]), int(config["num_attention_heads"])
    context = int(config["max_position_embeddings"])
    if family in WINDOW_IGNORED:  # within the window, ignoring it makes no difference
        context = min(context, int(config.get("sliding_window") or context))
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(name)
    writer.add_context_length(context)
    writer.add_embedding_length(int(config["hidden_size"]))
    writer.add_block_count(int(config["num_hidden_layers"]))
    writer.add_feed_forward_length(int(config["intermediate_size"]))
    writer.add_head_count(heads)
    writer.add_head_count_kv(1 if _latent(config) else int(config.get("num_key_value_heads") or heads))
    writer.add_vocab_size(rows)
    writer.add_file_type(int(gguf.LlamaFileType[FILE_TYPES.get(kind, f"MOSTLY_{kind.upper()}")]))
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    for key in ("layer_norm_epsilon", "layer_norm_eps"):
        if key in config:
            writer.add_layer_norm_eps(float(config[key]))
    if family in ("bloom", "gpt2"):  # no rotary positions
        return
    if "rms_norm_eps" in config:
        writer.add_layer_norm_rms_eps(float(config["rms_norm_eps"]))
    if "num_experts" in config:
        writer.add_expert_count(int(config["num_experts"]))
        writer.add_expert_used_count(int(config["num_experts_per_tok"]))
        writer.add_expert_feed_forward_length(int(config["moe_intermediate_size"]))
    if _latent(config):
        _add_latent(writer, config)
    else:
        width = head_width(config)
        writer.add_key_length(width)
        writer.add_value_length(width)
        writer.add_rope_dimension_count(int(width * float(rotation(config).get("partial_rotary_factor") or 1.0)))
    if family == "gpt_neox":
        writer.add_parallel_residual(bool(config["use_parallel_residual"]))
    if family in ("gemma2", "gemma3_text"):
        _add_windows(writer, config)
    _add_rotation(writer, config)


def _add_latent(writer: Any, config: Config) -> None:
    """Write DeepSeek's metadata. llama.cpp multiplies the queries by the key half of the decompression, so that all
    heads share one wide key."""
    import gguf

    latent, turned = int(config["kv_lora_rank"]), int(config["qk_rope_head_dim"])
    writer.add_q_lora_rank(int(config["q_lora_rank"] or 0))
    writer.add_kv_lora_rank(latent)
    writer.add_key_length(latent + turned)
    writer.add_value_length(latent)
    writer.add_key_length_mla(int(config["qk_nope_head_dim"]) + turned)
    writer.add_value_length_mla(int(config["v_head_dim"]))
    writer.add_rope_dimension_count(turned)
    writer.add_leading_dense_block_count(int(config["first_k_dense_replace"]))
    writer.add_expert_shared_count(int(config["n_shared_experts"]))
    writer.add_expert_weights_scale(float(config["routed_scaling_factor"]))
    writer.add_expert_weights_norm(bool(config["norm_topk_prob"]))
    writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)
    writer.add_expert_group_count(int(config["n_group"]))
    writer.add_expert_group_used_count(int(config["topk_group"]))


def _add_windows(writer: Any, config: Config) -> None:
    """Write Gemma 2's and 3's metadata: sliding-window layers, and scores soft-capped by tanh."""
    writer.add_sliding_window(int(config["sliding_window"]))
    if config.get("attn_logit_softcapping"):
        writer.add_attn_logit_softcapping(float(config["attn_logit_softcapping"]))
    if config.get("final_logit_softcapping"):
        writer.add_final_logit_softcapping(float(config["final_logit_softcapping"]))
    if "sliding_attention" in (config.get("rope_parameters") or {}):
        writer.add_rope_freq_base_swa(float(config["rope_parameters"]["sliding_attention"]["rope_theta"]))


def _add_rotation(writer: Any, config: Config) -> None:
    import gguf

    rope = rotation(config)
    rope_type = rope.get("rope_type") or rope.get("type")
    writer.add_rope_freq_base(_theta(config))
    if rope_type in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType[rope_type.upper()])
        writer.add_rope_scaling_factor(float(rope["factor"]))
    if rope_type == "yarn":
        writer.add_rope_scaling_orig_ctx_len(int(rope["original_max_position_embeddings"]))
        if _latent(config):
            writer.add_rope_scaling_yarn_log_mul(0.1 * float(rope["mscale_all_dim"]))
    if rope_type == "longrope":
        old = int(rope["original_max_position_embeddings"])
        factor = float(rope.get("factor") or int(config["max_position_embeddings"]) / old)
        usual = math.sqrt(1 + math.log(factor) / math.log(old)) if factor > 1 else 1.0
        writer.add_rope_scaling_orig_ctx_len(old)
        writer.add_rope_scaling_attn_factors(float(rope.get("attention_factor") or usual))
