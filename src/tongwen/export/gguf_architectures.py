"""What llama.cpp needs to know about each family: its name of the architecture, further metadata, the layout of tensors.

One row per `model_type`. The facts come from llama.cpp's conversion/*.py and src/models/*.cpp; a family is listed if a
tiny model gives the same tokens in llama.cpp as in transformers (tests/export/test_gguf.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

Config = Mapping[str, Any]
SOFTMAX, SIGMOID = 1, 2  # llama.cpp's numbers of the functions that turn a router's scores into weights
MOST = ("default", "linear", "yarn")


@dataclass(frozen=True)
class Cut:
    """Parts of a tensor that llama.cpp stores as tensors of their own.

    end:         how the tensor's name ends
    into:        what that end becomes, for each part
    interleaved: the parts alternate, rather than one following the other
    transposed:  each expert is stored as (in, out); the parts are columns
    """

    end: str
    into: tuple[str, ...]
    interleaved: bool = False
    transposed: bool = False


@dataclass(frozen=True)
class Architecture:
    """name:      llama.cpp's name of the architecture
    keys:      further metadata: llama.cpp's key -> the config's key, a number, or a function of the config
    carried:   config keys that those functions read
    fixed:     config values that llama.cpp assumes, where they differ from the defaults of the family's config class
    checked:   whether every config key that changes the computation is carried or has its default or fixed value
    rotations: rotary positions that llama.cpp computes for it
    pairs:     queries' and keys' rows are stored in rotation pairs, as in LLaMA's own files
    shifted:   pattern of tensors that scale by 1 + weight
    renamed:   patterns in the tensors' names -> names that `gguf`'s map has
    dropped:   pattern of tensors that llama.cpp does not use
    cuts:      tensors to take apart
    rounded:   YaRN's bounds are rounded by llama.cpp and not by the family, which changes positions a little
    """

    name: str
    keys: Mapping[str, str | float | Callable[[Config], Any]] = field(default_factory=dict)
    carried: tuple[str, ...] = ()
    fixed: Mapping[str, Any] | Callable[[Config], Mapping[str, Any]] = field(default_factory=dict)
    checked: bool = True
    rotations: tuple[str, ...] = MOST
    pairs: bool = False
    shifted: str = ""
    renamed: Mapping[str, str] = field(default_factory=dict)
    dropped: str = ""
    cuts: tuple[Cut, ...] = ()
    rounded: bool = False

    def fixed_values(self, config: Config) -> dict[str, Any]:
        return dict(self.fixed(config) if callable(self.fixed) else self.fixed)


def _is_sliding(config: Config) -> list[bool]:
    return [kind == "sliding_attention" for kind in config["layer_types"]]


def _first(key: str) -> Callable[[Config], int]:
    """Return the value of a key that may hold one value per layer, all equal."""

    def read(config: Config) -> int:
        value = config[key]
        return int(value[0] if isinstance(value, list) else value)

    return read


def _without_queries(config: Config) -> dict[str, Any]:
    """DeepSeek-V2-Lite, which llama.cpp recognises by its layers, does not compress queries."""
    return {"q_lora_rank": None} if int(config["num_hidden_layers"]) in (26, 27) else {}


def _ungrouped(config: Config) -> dict[str, Any]:
    return {"num_key_value_heads": config["num_attention_heads"]}


def _exaone_windows(config: Config) -> dict[str, Any]:
    """llama.cpp recognises the EXAONE that has windows by its layers."""
    layers = int(config["num_hidden_layers"])
    if layers == 64:
        return {"layer_types": ["sliding_attention" if (layer + 1) % 4 else "full_attention" for layer in range(64)]}
    return {"layer_types": ["full_attention"] * layers, "sliding_window": None}


def by_layer(config: Config, key: str, otherwise: Any) -> list[Any]:
    """Return one value per layer of a key that Gemma 4 sets for some layers alone."""
    own = {int(layer): values.get(key) for layer, values in (config.get("per_layer_config") or {}).items()}
    return [own.get(layer) or otherwise for layer in range(int(config["num_hidden_layers"]))]


def _wide_head(config: Config) -> int:
    """Return the head width of layers with full attention, which is wider than that of the others."""
    return int(max(by_layer(config, "head_dim", config["head_dim"])))


def _key_heads(config: Config) -> list[int]:
    return by_layer(config, "num_key_value_heads", config["num_key_value_heads"])


def _double_wide(config: Config) -> list[int]:
    layers, width = int(config["num_hidden_layers"]), int(config["intermediate_size"])
    doubled = int(config["num_kv_shared_layers"] or 0) if config["use_double_wide_mlp"] else 0
    return [width] * (layers - doubled) + [2 * width] * doubled


def _adjusted(config: Config) -> int:
    """Return the width of LFM2's feed-forward layers, which it computes from `intermediate_size`."""
    width, unit = int(config["intermediate_size"]), int(config["block_multiple_of"])
    if not config["block_auto_adjust_ff_dim"]:
        return width
    scaled = int((config["block_ffn_dim_multiplier"] or 1) * int(2 * width / 3))
    return -(-scaled // unit) * unit


_WINDOW: dict[str, Any] = {
    "attention.sliding_window": "sliding_window",
    "attention.sliding_window_pattern": _is_sliding,
}
_EXPERTS: dict[str, Any] = {"expert_feed_forward_length": "moe_intermediate_size"}
_SHARED: dict[str, Any] = _EXPERTS | {"expert_shared_feed_forward_length": "shared_expert_intermediate_size"}
_ROUTED: dict[str, Any] = _EXPERTS | {  # as DeepSeek-V3 chooses experts
    "leading_dense_block_count": "first_k_dense_replace",
    "expert_shared_count": "n_shared_experts",
    "expert_weights_scale": "routed_scaling_factor",
    "expert_weights_norm": "norm_topk_prob",
    "expert_gating_func": SIGMOID,
    "expert_group_count": "n_group",
    "expert_group_used_count": "topk_group",
}
_GRANITE: dict[str, Any] = {
    "attention.scale": "attention_multiplier",
    "embedding_scale": "embedding_multiplier",
    "residual_scale": "residual_multiplier",
    "logit_scale": "logits_scaling",
}
_GATED_DELTA: dict[str, Any] = {
    "ssm.conv_kernel": "linear_conv_kernel_dim",
    "ssm.state_size": "linear_key_head_dim",
    "ssm.group_count": "linear_num_key_heads",
    "ssm.time_step_rank": "linear_num_value_heads",
    "ssm.inner_size": lambda config: config["linear_value_head_dim"] * config["linear_num_value_heads"],
    "attention.recurrent_layers": lambda config: [kind == "linear_attention" for kind in config["layer_types"]],
    "full_attention_interval": lambda config: 1 + config["layer_types"].index("full_attention"),
}
_GATED_DELTA_KEYS = ("linear_value_head_dim", "linear_num_value_heads", "layer_types")
_SECTIONS: dict[str, Any] = {
    "rope.dimension_sections": lambda config: [*(config["rope_parameters"].get("mrope_section") or [11, 11, 10]), 0]
}
_LATENT: dict[str, Any] = {  # llama.cpp multiplies queries by the keys' decompression: all heads share one wide key
    "attention.q_lora_rank": lambda config: config["q_lora_rank"] or 0,
    "attention.kv_lora_rank": "kv_lora_rank",
    "attention.key_length": lambda config: config["kv_lora_rank"] + config["qk_rope_head_dim"],
    "attention.value_length": "kv_lora_rank",
    "attention.key_length_mla": lambda config: config["qk_nope_head_dim"] + config["qk_rope_head_dim"],
    "attention.value_length_mla": "v_head_dim",
    "rope.dimension_count": "qk_rope_head_dim",
    "attention.head_count_kv": 1,
}
_LATENT_KEYS = ("q_lora_rank", "kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim", "qk_head_dim")
_CONVOLUTION: dict[str, Any] = {
    "shortconv.l_cache": "conv_L_cache",
    "attention.head_count_kv": lambda config: [
        int(config["num_key_value_heads"]) if kind == "full_attention" else 0 for kind in config["layer_types"]
    ],
}
_LFM2_SIZES = ("block_multiple_of", "block_ffn_dim_multiplier", "block_auto_adjust_ff_dim", "full_attn_idxs")
_GATED = {
    r"experts\.w1\.": "experts.gate_proj.",
    r"experts\.w2\.": "experts.down_proj.",
    r"experts\.w3\.": "experts.up_proj.",
}
_FUSED = (Cut("experts.gate_up_proj", ("experts.gate_proj", "experts.up_proj")),)
_GATED_NORMS = r"(?<!linear_attn\.)norm\.weight$"
_MOE_LINEAR = Cut("moe.input_linear.weight", ("moe.experts.w1.weight", "moe.experts.w3.weight"))

ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture("llama", checked=False, rotations=(*MOST, "llama3"), pairs=True),
    "mistral": Architecture("llama", checked=False, rotations=(*MOST, "llama3"), pairs=True),
    "internlm3": Architecture("llama", rotations=(*MOST, "dynamic"), pairs=True),
    "mixtral": Architecture("llama", pairs=True, carried=("sliding_window",)),
    "ministral3": Architecture(
        "mistral3",
        {
            "attention.temperature_scale": lambda config: config["rope_parameters"].get("llama_4_scaling_beta"),
            "rope.scaling.yarn_log_multiplier": lambda config: config["rope_parameters"].get("mscale_all_dim"),
        },
        rotations=("default", "yarn"),
        pairs=True,
    ),
    "arcee": Architecture("arcee", pairs=True),
    "llama4_text": Architecture(
        "llama4",
        {
            "interleave_moe_layer_step": "interleave_moe_layer_step",
            "expert_feed_forward_length": "intermediate_size",
            "feed_forward_length": "intermediate_size_mlp",
        },
        carried=("moe_layers", "use_qk_norm"),
        rotations=("default", "llama3"),
        cuts=(
            Cut("experts.gate_up_proj", ("experts.gate_proj", "experts.up_proj"), transposed=True),
            Cut("experts.down_proj", ("experts.down_proj",), transposed=True),
        ),
    ),
    "qwen2": Architecture("qwen2", checked=False),
    "qwen2_moe": Architecture("qwen2moe", _SHARED),
    "qwen3": Architecture("qwen3", checked=False),
    "qwen3_moe": Architecture("qwen3moe", _EXPERTS, checked=False, cuts=_FUSED),
    "qwen3_next": Architecture(
        "qwen3next",
        _SHARED | _GATED_DELTA,
        carried=_GATED_DELTA_KEYS,
        shifted=_GATED_NORMS,
        fixed={"norm_topk_prob": True},
        cuts=_FUSED,
    ),
    "qwen3_5_text": Architecture("qwen35", _GATED_DELTA | _SECTIONS, carried=_GATED_DELTA_KEYS, shifted=_GATED_NORMS),
    "qwen3_5_moe_text": Architecture(
        "qwen35moe",
        _SHARED | _GATED_DELTA | _SECTIONS,
        carried=_GATED_DELTA_KEYS,
        shifted=_GATED_NORMS,
        cuts=_FUSED,
    ),
    "deepseek_v2": Architecture(
        "deepseek2",
        _LATENT | _ROUTED | {"expert_gating_func": SOFTMAX},
        carried=_LATENT_KEYS,
        fixed=_without_queries,
        rotations=("default", "yarn"),
        cuts=_FUSED,
    ),
    "deepseek_v3": Architecture(
        "deepseek2",
        _LATENT | _ROUTED,
        checked=False,
        fixed=_without_queries,
        rotations=("default", "yarn"),
        cuts=_FUSED,
    ),
    "glm4_moe_lite": Architecture(
        "deepseek2",
        _LATENT | _ROUTED | {"leading_dense_block_count": lambda config: config["mlp_layer_types"].count("dense")},
        carried=(*_LATENT_KEYS, "mlp_layer_types"),
        fixed=_without_queries,
        rotations=("default", "yarn"),
        cuts=_FUSED,
    ),
    "glm": Architecture("chatglm", checked=False),
    "glm4": Architecture("glm4", checked=False),
    "glm4_moe": Architecture("glm4moe", _ROUTED, carried=("use_qk_norm",), cuts=_FUSED),
    "dots1": Architecture("dots1", _ROUTED, fixed=_ungrouped, cuts=_FUSED),
    "ernie4_5": Architecture("ernie4_5"),
    "ernie4_5_moe": Architecture(
        "ernie4_5-moe",
        _EXPERTS
        | {
            "interleave_moe_layer_step": "moe_layer_interval",
            "leading_dense_block_count": "moe_layer_start_index",
            "expert_shared_count": "moe_num_shared_experts",
            "expert_shared_feed_forward_length": lambda config: (
                config["moe_intermediate_size"] * config["moe_num_shared_experts"]
            ),
        },
        renamed={r"mlp\.moe_statics\.e_score": "mlp.gate.e_score"},
        cuts=_FUSED,
    ),
    "gpt_oss": Architecture(
        "gpt-oss",
        {"attention.sliding_window": "sliding_window", "expert_feed_forward_length": "intermediate_size"},
        rotations=("default", "yarn"),
        renamed={r"sinks$": "sinks.weight", r"down_proj_bias$": "down_proj.bias"},
        cuts=(
            Cut(
                "experts.gate_up_proj",
                ("experts.gate_proj", "experts.up_proj"),
                interleaved=True,
                transposed=True,
            ),
            Cut("experts.down_proj", ("experts.down_proj",), transposed=True),
            Cut(
                "experts.gate_up_proj_bias",
                ("experts.gate_proj.bias", "experts.up_proj.bias"),
                interleaved=True,
            ),
        ),
        rounded=True,
    ),
    "hunyuan_v1_dense": Architecture("hunyuan-dense", rotations=("default", "dynamic")),
    "hunyuan_v1_moe": Architecture(
        "hunyuan-moe",
        {
            "expert_used_count": _first("moe_topk"),
            "expert_feed_forward_length": "intermediate_size",
            "expert_shared_count": 1,
            "expert_shared_feed_forward_length": "intermediate_size",
        },
        carried=("moe_topk",),
        rotations=("default", "dynamic"),
        cuts=_FUSED,
    ),
    "granite": Architecture("granite", _GRANITE, pairs=True),
    "granitemoe": Architecture("granitemoe", _GRANITE, pairs=True, cuts=(_MOE_LINEAR,)),
    "granitemoeshared": Architecture(
        "granitemoe",
        _GRANITE | {"expert_shared_feed_forward_length": "shared_intermediate_size"},
        pairs=True,
        cuts=(
            _MOE_LINEAR,
            Cut("shared_mlp.input_linear.weight", ("mlp.shared_mlp.gate_proj.weight", "mlp.shared_mlp.up_proj.weight")),
        ),
    ),
    "olmo": Architecture("olmo", {"attention.layer_norm_epsilon": 1e-5, "attention.clamp_kqv": "clip_qkv"}, pairs=True),
    "olmo2": Architecture("olmo2"),
    "olmo3": Architecture("olmo2", _WINDOW, carried=("layer_types",)),
    "olmoe": Architecture("olmoe", fixed=_ungrouped, cuts=_FUSED),
    "cohere": Architecture("command-r", {"logit_scale": "logit_scale"}, rotations=("default",)),
    "cohere2": Architecture("cohere2", {**_WINDOW, "logit_scale": "logit_scale"}, rotations=("default",)),
    "nemotron": Architecture("nemotron", rotations=("default", "linear"), shifted=r"norm\.weight$"),
    "minicpm3": Architecture(
        "minicpm3",
        {
            "attention.q_lora_rank": "q_lora_rank",
            "attention.kv_lora_rank": "kv_lora_rank",
            "attention.key_length": lambda config: config["qk_nope_head_dim"] + config["qk_rope_head_dim"],
            "attention.value_length": "v_head_dim",
            "rope.dimension_count": "qk_rope_head_dim",
        },
        carried=_LATENT_KEYS,
        rotations=("default",),
    ),
    "stablelm": Architecture("stablelm", {"use_parallel_residual": "use_parallel_residual"}),
    "starcoder2": Architecture("starcoder2"),
    "seed_oss": Architecture("seed_oss"),
    "exaone4": Architecture(
        "exaone4", _WINDOW, ("sliding_window_pattern",), _exaone_windows, rotations=("default", "llama3")
    ),
    "exaone_moe": Architecture(
        "exaone-moe",
        {
            **_WINDOW,
            **_EXPERTS,
            "leading_dense_block_count": lambda config: config["mlp_layer_types"].count("dense"),
            "expert_shared_count": "num_shared_experts",
            "expert_shared_feed_forward_length": lambda config: (
                config["moe_intermediate_size"] * config["num_shared_experts"]
            ),
            "expert_weights_scale": "routed_scaling_factor",
            "expert_weights_norm": "norm_topk_prob",
            "expert_gating_func": SIGMOID,
        },
        carried=("layer_types", "mlp_layer_types", "first_k_dense_replace", "sliding_window_pattern"),
        rotations=("default",),
        cuts=_FUSED,
    ),
    "minimax_m2": Architecture(
        "minimax-m2",
        {"expert_feed_forward_length": "intermediate_size", "expert_gating_func": SIGMOID},
        rotations=("default",),
        cuts=_FUSED,
    ),
    "lfm2": Architecture(
        "lfm2", _CONVOLUTION | {"feed_forward_length": _adjusted}, carried=("layer_types", *_LFM2_SIZES)
    ),
    "lfm2_moe": Architecture(
        "lfm2moe",
        _CONVOLUTION | _EXPERTS | {"leading_dense_block_count": "num_dense_layers", "expert_gating_func": SIGMOID},
        carried=("layer_types",),
        fixed={"tie_word_embeddings": True},
        renamed={r"expert_bias$": "expert_bias.bias", **_GATED},
        cuts=_FUSED,
    ),
    "bloom": Architecture("bloom", checked=False),
    "gpt2": Architecture("gpt2", checked=False),
    "gpt_neox": Architecture("gptneox", checked=False),
    "gemma": Architecture("gemma", checked=False, shifted=r"norm\.weight$"),
    "gemma2": Architecture("gemma2", checked=False, shifted=r"norm\.weight$"),
    "gemma3_text": Architecture("gemma3", checked=False, rotations=("default", "linear"), shifted=r"norm\.weight$"),
    "gemma4_text": Architecture(
        "gemma4",
        {
            **_WINDOW,
            "attention.shared_kv_layers": "num_kv_shared_layers",
            "embedding_length_per_layer_input": lambda config: int(config["hidden_size_per_layer_input"] or 0),
            "attention.key_length": _wide_head,
            "attention.value_length": _wide_head,
            "attention.key_length_swa": "head_dim",
            "attention.value_length_swa": "head_dim",
            "rope.dimension_count": _wide_head,
            "rope.dimension_count_swa": "head_dim",
            "attention.head_count_kv": _key_heads,
            "feed_forward_length": _double_wide,
            "expert_feed_forward_length": "moe_intermediate_size",
            "expert_used_count": "top_k_experts",
        },
        carried=(
            *("layer_types", "per_layer_config", "hidden_size_per_layer_input"),
            *("use_double_wide_mlp", "final_logit_softcapping", "enable_moe_block", "attention_k_eq_v"),
        ),
        fixed=lambda config: {"vocab_size_per_layer_input": config["vocab_size"]},
        rotations=("default", "proportional"),
        renamed={
            r"layer_scalar$": "layer_scalar.weight",
            r"router\.scale$": "router.proj.scale",
            r"router\.per_expert_scale$": "experts.down_proj.scale",
        },
    ),
    "phi": Architecture("phi2", fixed={"qk_layernorm": False}, rotations=("default",)),
    "phi3": Architecture("phi3", checked=False, rotations=("default", "longrope")),
    "smollm3": Architecture("smollm3", checked=False, pairs=True),
}
