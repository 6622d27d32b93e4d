"""Make a GGUF file's metadata from a model's config, and reject configs that llama.cpp would compute differently.

llama.cpp hard-codes some values for a family (no rotations in every fourth layer, a scale of the queries); a config
with other values raises an error.
"""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np

from tongwen.core.errors import ModelError
from tongwen.core.i18n import _
from tongwen.export.gguf_architectures import ARCHITECTURES, Architecture, Config, by_layer

FILE_TYPES = {"f32": "ALL_F32"}  # all others are MOSTLY_...
WINDOW_IGNORED = ("mistral", "phi3")  # llama.cpp ignores these families' sliding window
# Config keys that every file carries, and keys that change no computation (or only which tensors exist: llama.cpp
# refuses a file that lacks a tensor or has one too many).
CARRIED = {
    *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim"),
    *("intermediate_size", "max_position_embeddings", "rms_norm_eps", "layer_norm_eps", "norm_eps", "norm_epsilon"),
    *("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_experts_per_tok", "moe_k"),
    *("rope_parameters", "rope_theta", "rope_scaling", "partial_rotary_factor", "sliding_window"),
    *(
        "tie_word_embeddings",
        "attention_bias",
        "attention_out_bias",
        "mlp_bias",
        "use_bias",
        "use_qkv_bias",
        "qkv_bias",
    ),
    *("qk_layernorm", "use_qk_norm", "conv_bias"),
}
HARMLESS = {
    *("architectures", "model_type", "transformers_version", "_name_or_path", "dtype", "torch_dtype", "auto_map"),
    *(
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
        "eod_token_id",
        "sep_token_id",
        "cls_token_id",
        "tokenizer_class",
    ),
    *("id2label", "label2id", "problem_type", "is_encoder_decoder", "chunk_size_feed_forward", "pretraining_tp"),
    *("use_cache", "return_dict", "output_attentions", "output_hidden_states", "output_router_logits"),
    *("initializer_range", "attention_dropout", "hidden_dropout", "residual_dropout", "resid_pdrop", "embd_pdrop"),
    *("embedding_dropout", "router_aux_loss_coef", "router_jitter_noise", "aux_loss_alpha", "max_window_layers"),
    *("num_nextn_predict_layers", "mtp_num_hidden_layers", "mlp_only_layers_comment"),
}
EPSILONS = {
    "attention.layer_norm_rms_epsilon": ("rms_norm_eps",),
    "attention.layer_norm_epsilon": ("layer_norm_epsilon", "layer_norm_eps", "norm_epsilon"),
}


def check_family(kind: str, folder: str = "OUT/merge") -> None:
    """Raise ModelError for a family whose GGUF has not been verified. folder: the model, for the remedy."""
    if kind not in ARCHITECTURES:
        raise ModelError(
            _("writing GGUF is not supported for the family {kind!r}").format(kind=kind),
            place="--to gguf",
            remedy=_("try llama.cpp's own converter on the merged model: {command}").format(
                command=converter_command(folder)
            ),
        )


def converter_command(folder: str, *options: str) -> str:
    """Return the command by which llama.cpp's own converter writes a model's GGUF."""
    return " ".join(("python llama.cpp/convert_hf_to_gguf.py", *options, folder))


def check_config(config: Config) -> None:
    """Raise ModelError if llama.cpp would compute another model. config: from `gguf_layout.with_llama_keys`."""
    check_family(str(config["model_type"]))
    for key, expected in _expected(config).items():
        found = config.get(key)
        if (found or None) != (expected or None):
            shown = json.dumps(found, ensure_ascii=False)
            raise _mismatch(f"config.json: {key}: {shown}", json.dumps(expected, ensure_ascii=False))
    rope, kind = rotation(config), str(config["model_type"])
    if rope_type(rope) not in ARCHITECTURES[kind].rotations:
        raise ModelError(
            _("llama.cpp does not support {how!r} rotary positions for {kind}").format(how=rope_type(rope), kind=kind),
            place="rope_scaling",
            remedy="--to hf",
        )
    for key, expected in _expected_of_yarn(config, rope).items() if rope_type(rope) == "yarn" else ():
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
        return {"attention_bias": False, "rope_interleave": True, **ARCHITECTURES[kind].fixed_values(config)}
    return _defaults(config, ARCHITECTURES[kind]) if ARCHITECTURES[kind].checked else {}


def _defaults(config: Config, architecture: Architecture) -> dict[str, Any]:
    """Return the default or fixed value of each config key that a file does not carry."""
    from transformers import AutoConfig

    usual = AutoConfig.for_model(config["model_type"], num_hidden_layers=config["num_hidden_layers"]).to_dict()
    carried = CARRIED | HARMLESS | set(architecture.carried) | set(map(str, architecture.keys.values()))
    return {key: value for key, value in usual.items() if key not in carried} | architecture.fixed_values(config)


_GEMMA = {"attention_bias": False, "use_bidirectional_attention": False}


def _expected_of_yarn(config: Config, rope: Config) -> dict[str, Any]:
    """Return the YaRN parameters that llama.cpp hard-codes. DeepSeek sets its queries' scale by `mscale`; for others
    llama.cpp computes it."""
    scaled = "yarn_log_multiplier" in "".join(ARCHITECTURES[str(config["model_type"])].keys)
    usual = 1.0 if _is_latent(config) or scaled else 0.1 * math.log(float(rope["factor"])) + 1
    fixed = {"beta_fast": 32, "beta_slow": 1, "truncate": True, "attention_factor": usual}
    if ARCHITECTURES[str(config["model_type"])].rounded:
        del fixed["truncate"]
    checked = {key: expected for key, expected in fixed.items() if rope.get(key) is not None}
    keys = ("mscale", "mscale_all_dim")
    return checked | ({one: rope.get(other) or 1.0 for one, other in (keys, keys[::-1])} if _is_latent(config) else {})


def _windows(layers: int, every: int) -> list[str]:
    return ["sliding_attention" if (layer + 1) % every else "full_attention" for layer in range(layers)]


def _query_scale(config: Config, largest: bool) -> int:
    """Return Gemma's query scale. llama.cpp recognises the largest model of each generation by its layer count."""
    return int(config["hidden_size"]) // int(config["num_attention_heads"]) if largest else head_width(config)


def rotation(config: Config) -> dict[str, Any]:
    """Return the rotary parameters of the layers with full attention."""
    found: dict[str, Any] = config.get("rope_parameters") or config.get("rope_scaling") or {}
    return dict(found.get("full_attention", found))


def rope_type(rope: Config) -> str:
    return str(rope.get("rope_type") or rope.get("type") or "default")


def describe_rounding(config: Config) -> str:
    """Describe a difference from llama.cpp that its own converter accepts, too; "" without one."""
    rope = rotation(config)
    if rope_type(rope) != "yarn" or rope.get("truncate", True):
        return ""
    return _("llama.cpp rounds the bounds of YaRN, and this model does not: answers to long texts may differ a little")


def extra_tensors(config: Config) -> dict[str, Any]:
    """Return tensors that only GGUF has: the factors by which LLaMA 3.1 and long-context Phi-3 slow each rotation, and
    by which Gemma 4 stops most of them."""
    rope, width = rotation(config), head_width(config)
    if "long_factor" in rope:
        factors = {"rope_factors_long.weight": "long_factor", "rope_factors_short.weight": "short_factor"}
        return {gguf_name: np.array(rope[key], np.float32) for gguf_name, key in factors.items()}
    if rope_type(rope) == "proportional":
        width = max(by_layer(config, "head_dim", width))
        turned = int(width * rope["partial_rotary_factor"] / 2)
        return {"rope_freqs.weight": np.array([1.0] * turned + [1e30] * (width // 2 - turned), np.float32)}
    if rope_type(rope) != "llama3":
        return {}
    old = float(rope["original_max_position_embeddings"])
    low, high, factor = float(rope["low_freq_factor"]), float(rope["high_freq_factor"]), float(rope["factor"])
    waves = 2 * math.pi * _theta(config) ** (np.arange(0, width, 2) / width)
    smooth = np.clip((old / waves - low) / (high - low), 0, 1)
    return {"rope_freqs.weight": (1 / ((1 - smooth) / factor + smooth)).astype(np.float32)}


def head_width(config: Config) -> int:
    return int(config.get("head_dim") or int(config["hidden_size"]) // int(config["num_attention_heads"]))


def _is_latent(config: Config) -> bool:
    """Whether keys and values are stored compressed, as DeepSeek does."""
    return ARCHITECTURES[str(config["model_type"])].name == "deepseek2"


def _theta(config: Config) -> float:
    rope, width = rotation(config), head_width(config)
    theta = float(config.get("rope_theta") or rope.get("rope_theta") or 10000.0)
    return theta * float(rope["alpha"]) ** (width / (width - 2)) if rope.get("alpha") else theta  # as Hunyuan does


def add_metadata(writer: Any, config: Config, name: str, rows: int, kind: str) -> None:
    """Write the metadata that llama.cpp needs to build the model. rows: of the embedding; kind: dtype."""
    import gguf

    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(name)
    writer.add_file_type(int(gguf.LlamaFileType[FILE_TYPES.get(kind, f"MOSTLY_{kind.upper()}")]))
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    types = {bool: "BOOL", int: "UINT32", float: "FLOAT32", str: "STRING", list: "ARRAY"}
    for key, value in model_metadata(config, rows).items():
        writer.add_key_value(f"{writer.arch}.{key}", value, gguf.GGUFValueType[types[type(value)]])


def model_metadata(config: Config, rows: int) -> dict[str, Any]:
    """Return the model's metadata: llama.cpp's key, without the name of the architecture -> value."""
    family, heads = str(config["model_type"]), int(config["num_attention_heads"])
    architecture = ARCHITECTURES[family]
    out: dict[str, Any] = {
        "context_length": _context(config, architecture),
        "embedding_length": int(config["hidden_size"]),
        "block_count": int(config["num_hidden_layers"]),
        "feed_forward_length": int(config["intermediate_size"]),
        "attention.head_count": heads,
        "attention.head_count_kv": int(config.get("num_key_value_heads") or heads),
        "vocab_size": rows,
    }
    for key, aliases in EPSILONS.items():
        for alias in (*aliases, "norm_eps"):
            if config.get(alias) is not None:
                out.setdefault(key, float(config[alias]))
    if family in ("bloom", "gpt2"):  # no rotary positions
        return out
    if config.get("num_experts"):
        used = config.get("num_experts_per_tok") or config.get("moe_k") or config.get("top_k_experts") or 1
        out |= {"expert_count": int(config["num_experts"]), "expert_used_count": int(used)}
    width = head_width(config)
    turned = int(width * float(rotation(config).get("partial_rotary_factor") or 1.0))
    out |= {"attention.key_length": width, "attention.value_length": width, "rope.dimension_count": turned}
    if family == "gpt_neox":
        out["use_parallel_residual"] = bool(config["use_parallel_residual"])
    if family in ("gemma2", "gemma3_text"):
        out["attention.sliding_window"] = int(config["sliding_window"])
    for key in ("attn_logit_softcapping", "final_logit_softcapping"):
        if config.get(key):
            out[key] = float(config[key])
    out |= _rotation_metadata(config)
    for key, source in architecture.keys.items():
        value = config.get(source) if isinstance(source, str) else source(config) if callable(source) else source
        if value is not None:
            out[key] = value
    return out


def _context(config: Config, architecture: Architecture) -> int:
    """Return the longest text. Within a window that llama.cpp does not keep, ignoring it makes no difference."""
    context, window = int(config["max_position_embeddings"]), config.get("sliding_window")
    ignored = "attention.sliding_window" not in architecture.keys and architecture.name not in ("gemma2", "gemma3")
    slides = any(kind != "full_attention" for kind in config.get("layer_types") or ["unknown"])
    return min(context, int(window)) if window and ignored and slides else context


def _rotation_metadata(config: Config) -> dict[str, Any]:
    rope, by_layer = rotation(config), config.get("rope_parameters") or {}
    out: dict[str, Any] = {"rope.freq_base": _theta(config)}
    if "sliding_attention" in by_layer:
        out["rope.freq_base_swa"] = float(by_layer["sliding_attention"]["rope_theta"])
    if rope_type(rope) in ("linear", "yarn"):
        out |= {"rope.scaling.type": rope_type(rope), "rope.scaling.factor": float(rope["factor"])}
    if rope_type(rope) == "yarn":
        out["rope.scaling.original_context_length"] = int(rope["original_max_position_embeddings"])
        if _is_latent(config):
            out["rope.scaling.yarn_log_multiplier"] = 0.1 * float(rope["mscale_all_dim"])
    if rope_type(rope) == "longrope":
        old = int(rope["original_max_position_embeddings"])
        factor = float(rope.get("factor") or int(config["max_position_embeddings"]) / old)
        usual = math.sqrt(1 + math.log(factor) / math.log(old)) if factor > 1 else 1.0
        out["rope.scaling.original_context_length"] = old
        out["rope.scaling.attn_factor"] = float(rope.get("attention_factor") or usual)
    return out
