"""A tiny random model of any architecture in the installed transformers: its config class's defaults, with each size shrunk."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from tests.conftest import byte_level_tokenizer

WIDTH, LAYERS, HEADS, GROUPS, HEAD, EXPERTS = 64, 2, 4, 2, 16, 4
LARGEST, LOUD = 20e6, 2.0  # parameters; spread of the logits
SPARE_ROWS = 64  # of the embedding, behind the tokenizer's, for the tokens of pictures and sound
NOISE = 0.1  # as large beside the width as in a real model, so that one token moves another's score
SIZES: tuple[tuple[int, str], ...] = (
    (
        WIDTH,
        "hidden_size d_model n_embd dim_model embed_dim embedding_size emb_dim embedding_dim word_embed_proj_dim"
        " out_hidden_size projection_dim image_text_hidden_size text_hidden_size output_dim encoder_hidden_size adapter_out_dim"
        " adapter_in_dim vision_output_dim projector_input_dim projector_output_dim projector_hidden_size lru_width"
        " input_embedding_size output_embedding_size backbone_hidden_size attention_hidden_size output_channels mlp_dim"
        " projection_hidden_size projection_hidden_dim vision_hidden_size mamba_d_ssm hidden_size_global input_size"
        " alignment_intermediate_size merged_hidden_size projection_intermediate_size image_token_embed_dim codebook_dim"
        " vector_quantization_hidden_dimension dim_head_total patch_embed_hidden_size hidden_dim audio_hidden_size"
        " thinker_hidden_size decoder_hidden_size n_state adapter_input_size downsample_hidden_size moe_hidden_size"
        " global_hidden_size ple_embed_dim num_pos_feats_total ext_pw_out_channel depthwise_separable_out_channel"
        " nemo_conv_channels shape_embed_dim pronunciation_embed_dim encoder_embed_dim decoder_embed_dim",
    ),
    (
        2 * WIDTH,
        "intermediate_size n_inner ffn_dim encoder_ffn_dim decoder_ffn_dim ffn_hidden_size dim_ff dff d_ff d_inner"
        " feed_forward_size intermediate_size_mlp dense_intermediate_size attention_hidden_size_zamba",
    ),
    (
        WIDTH // 2,
        "moe_intermediate_size shared_expert_intermediate_size moe_shared_expert_intermediate_size"
        " shared_intermediate_size shared_experts_intermediate_size expert_ffn_hidden_size share_expert_dim q_lora_rank"
        " moe_ffn_hidden_size router_hidden_size image_size resolution base_channels",
    ),
    (
        LAYERS,
        "num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers layers depth num_blocks"
        " num_encoder_layers num_decoder_layers conf_num_hidden_layers num_experts_per_tok num_experts_per_token moe_topk moe_k top_k_experts"
        " resampler_depth hc_lowrank index_topk_blocks laurel_rank gated_norm_rank norm_rank",
    ),
    (
        HEADS,
        "num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads attention_heads"
        " num_encoder_attention_heads num_decoder_attention_heads swa_num_attention_heads num_sliding_attention_heads"
        " linear_num_value_heads linear_num_heads resampler_n_heads index_n_heads num_query_tokens resampler_n_latents"
        " latent_query_num num_local_experts n_routed_experts num_experts moe_num_experts conf_num_attention_heads"
        " zero_expert_num resampler_heads resampler_num_latents mamba_expand_heads",
    ),
    (
        GROUPS,
        "num_key_value_heads num_kv_heads swa_num_key_value_heads linear_num_key_heads num_query_groups"
        " resampler_num_key_value_heads num_global_key_value_heads",
    ),
    (
        HEAD,
        "head_dim kv_lora_rank qk_nope_head_dim v_head_dim index_head_dim linear_key_head_dim linear_value_head_dim"
        " linear_head_dim d_kv dim_head d_head attention_head_size kv_channels swa_head_dim resampler_head_dim"
        " resampler_dim_head global_head_dim mamba_d_state ssm_state_size state_size chunk_size mamba_chunk_size o_lora_rank"
        " d_rel hidden_size_per_layer_input num_position_embeddings mamba_dt_rank time_step_rank adapter_rank block_size"
        " attention_head_dim mamba_d_head swa_v_head_dim num_pos_feats expert_embed_size query_pre_attn_scalar",
    ),
    (
        HEAD // 2,
        "qk_rope_head_dim rotary_dim sliding_window sliding_window_size window_size local_attention"
        " attention_window_size index_topk swa_rope_dim keep_window_size",
    ),
    (
        256,
        "max_position_embeddings n_positions n_ctx max_seq_len max_source_positions max_target_positions context_length"
        " position_embedding_size max_2d_position_embeddings rel_extent num_embeddings codebook_size index_block_size encoder_hash_byte_group_vocab",
    ),
    (
        1,
        "n_group num_expert_group topk_group first_k_dense_replace n_shared_experts num_shared_experts num_nextn_predict_layers n_groups"
        " mamba_n_groups num_kv_shared_layers num_dense_layers first_dense_layers",
    ),
    (14, "patch_size"),
)
SPECIAL = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
SMALL = {name: size for size, names in SIZES for name in names.split()}
# What is tried in turn where an architecture refuses the shape above; `fill`: give also sizes that are None by default.
VARIATIONS: tuple[dict[str, Any], ...] = (
    {},
    {"num_key_value_heads": HEADS},
    {"head_dim": HEAD // 2, "num_key_value_heads": HEADS},
    {"num_hidden_layers": 4},
    {"fill": True},
    {"fill": True, "num_key_value_heads": HEADS},
    {"head_dim": 2 * HEAD, "num_key_value_heads": HEADS},
)
ROTATED = {"rope_type": "default", "rope_theta": 1e4}
THREE_AXES = {"rope_parameters": ROTATED | {"mrope_section": [2, 3, 3]}}
HALF_OF_THREE_AXES = {"rope_parameters": ROTATED | {"mrope_section": [1, 1, 2], "partial_rotary_factor": 0.5}}
BY_LAYER = {"rope_parameters": {"full_attention": ROTATED, "sliding_attention": ROTATED}}
INDEXER = {"indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 16}
INDEXER |= {"indexer_compress_ratio": 4}
LATENT_WINDOWS = {"num_key_value_heads": HEADS, "swa_num_attention_heads": HEADS, "swa_num_key_value_heads": HEADS}
LATENT_WINDOWS |= {"swa_q_lora_rank": 32, "swa_kv_lora_rank": 16, "swa_head_dim": 24, "swa_qk_nope_head_dim": 16}
LATENT_WINDOWS |= {"swa_v_head_dim": 16}
SHARES_ALL = {"num_kv_shared_layers": 2, "hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}
PICTURE = {"vocabulary_map": {"<image>": 500}}
# Values that depend on each other in ways of one architecture.
OWN: dict[str, dict[str, Any]] = {
    "bailing_hybrid": {"num_key_value_heads": 4, "linear_num_heads": 4},
    "kimi_linear": {"num_key_value_heads": 4, "linear_num_heads": 4},
    "bamba": {"mamba_n_heads": 8, "mamba_d_head": 16, "attn_layer_indices": [1]},
    "chameleon": PICTURE,
    "cohere_compass": {"text_config": BY_LAYER},
    "cohere_compass_text": BY_LAYER,
    "cpmant": {"init_std": 0.02},  # its default, 1, makes attention scores so large that fp32's rounding shows
    "dbrx": {"attn_config": {"rope_theta": 1e4, "kv_n_heads": GROUPS, "clip_qkv": 8.0}},
    "deepseek_ocr2": {"text_config": {"num_experts_per_tok": 2, "mlp_layer_types": ["dense", "sparse"]}},
    "dots3_note": {"text_config": LATENT_WINDOWS},
    "dots3_note_text": LATENT_WINDOWS,
    "emu3": PICTURE,
    "ernie4_5_vl_moe": {"text_config": {"rope_parameters": ROTATED | {"mrope_section": [3, 3, 2]}}},
    "falcon_h1": {"mamba_n_heads": 4, "mamba_d_head": 16},
    "granitemoehybrid": {"mamba_n_heads": 8, "mamba_d_head": 16, "layer_types": ["mamba", "attention"]},
    "florence2": {
        "vision_config": {"embed_dim": [16] * 4, "num_heads": [2] * 4, "num_groups": [2] * 4, "depths": [1] * 4}
    },
    "fun_asr_nano": {"adaptor_config": {"intermediate_size": WIDTH // 4}},
    "gemma4_assistant": {"text_config": SHARES_ALL},
    "gemma4_unified_assistant": {"text_config": {"num_kv_shared_layers": 2}},
    "glm5_next": {"text_config": {"num_key_value_heads": HEADS, "linear_num_heads": HEADS, "index_kpool": 4}},
    "hunyuan_vl": {"text_config": {"head_dim": 16, "rope_parameters": ROTATED | {"mrope_section": [2, 2, 2, 2]}}},
    "granite4_vision": {"deepstack_layer_map": [[0, 0]], "spatial_target_layers": [1], "downsample_rate": "1/2"},
    "gemma3n_text": {
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "intermediate_size": [128] * 4,
        "activation_sparsity_pattern": [0.95, 0.0, 0.0, 0.0],
    },
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mistral4": {
        "head_dim": 8,
        "rope_parameters": ROTATED | {"llama_4_scaling_beta": 0.1, "original_max_position_embeddings": 64},
    },
    "molmo2": {"adapter_config": {"vision_feature_layer": [1, 0]}},
    "nemotron_h_omni": {"vision_config": {"video_temporal_patch_size": 2}},
    "qwen4_exp": {"text_config": INDEXER},
    "qwen4_exp_text": INDEXER,
    "qwen3_omni_moe_thinker": {},
    "reformer": {"is_decoder": True, "axial_pos_embds_dim": [16, 48], "axial_pos_shape": [16, 16]},
    "step3p7": {"text_config": {"sliding_window": 8}},
    "vibevoice_asr": {
        part: {"num_filters": 4, "depths": [1] * 7, "hidden_size": 8}
        for part in ("acoustic_tokenizer_encoder_config", "semantic_tokenizer_encoder_config")
    },
    "xmod": {"default_language": "en_XX"},
    "zamba": {"attention_hidden_size": 128, "attention_head_dim": 32},
    "zamba2": {"attention_hidden_size": 128, "attention_head_dim": 32, "n_mamba_heads": 8, "mamba_headdim": 16},
}
OWN |= {
    kind: {"text_config": THREE_AXES} for kind in ("paddleocr_vl", "qwen2_5_omni_thinker", "qwen2_5_vl", "qwen2_vl")
}
OWN |= {
    kind: {"text_config": HALF_OF_THREE_AXES}
    for kind in ("glm46v", "glm4v", "glm4v_moe", "glm_ocr", "glmga", "qwen3_5", "qwen3_5_moe")
}
OWN |= dict.fromkeys(("qwen3_5_text", "qwen3_5_moe_text"), HALF_OF_THREE_AXES)
# Their residual streams hold numbers so large that fp32's rounding alone would exceed 1e-5 in the logits.
LARGE_STREAMS = (
    "gemma3n_text",
    "gemma4",
    "gemma4_text",
    "gemma4_unified",
    "gemma4_unified_text",
    "qwen3_5",
    "qwen3_5_moe_text",
    "qwen3_5_text",
    "qwen3_next",
)
OWN["qwen2_5_omni_thinker"]["vision_start_token_id"] = OWN["qwen3_omni_moe_thinker"]["vision_start_token_id"] = 500
# A model that says so wants a picture or sound beside every text: it can be built, but not asked.
WANTS_MORE = re.compile(
    r"pixel_values|flattened_patches|Bbox|input_features|encoder_outputs|'state'|input_ids or inputs_embeds"
)


def kinds() -> list[str]:
    """Return the model types that transformers opens as a language model, with or without towers around it."""
    from transformers.models.auto import modeling_auto as auto

    return sorted(
        {
            *auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
            *auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
            *auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
        }
    )


def class_name(kind: str) -> str:
    """Return the model class of a type: the causal language model if it has one, else the one with towers."""
    from transformers.models.auto import modeling_auto as auto

    wrapped = (auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES)
    for names in (*wrapped, auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        if kind in names:
            name = names[kind]
            return name if isinstance(name, str) else name[0]
    raise KeyError(kind)


def make_base(folder: Path, kind: str) -> Path:
    """Save a tiny random model and a tokenizer. Raises the last error if no variation can be built."""
    tokenizer = byte_level_tokenizer(folder)
    last: Exception | None = None
    for variation in VARIATIONS:
        try:
            torch.manual_seed(0)
            save_model(folder, kind, variation, len(tokenizer))
        except Exception as error:
            last = last or error
        else:
            return folder
    assert last
    raise last


def save_model(folder: Path, kind: str, variation: dict[str, Any], tokens: int) -> None:
    import transformers

    config = tiny_config(kind, variation, tokens)
    model_class = getattr(transformers, class_name(kind))
    with torch.device("meta"):
        size = sum(part.numel() for part in model_class._from_config(copy.deepcopy(config)).parameters())
    if size > LARGEST:
        raise ValueError(f"it still has {size / 1e6:.0f} million parameters")
    model = model_class._from_config(config).to(torch.float32).eval()
    with torch.no_grad():
        for part in model.parameters():
            part.add_(torch.randn_like(part) * (NOISE / 4 if kind in LARGE_STREAMS else NOISE))
    try:
        logits = logits_of(model)
    except (TypeError, ValueError) as error:
        if not WANTS_MORE.search(str(error)):
            raise
    else:
        if not torch.isfinite(logits).all():
            raise ValueError("its logits are not finite")
        if (loud := float(logits.std())) > LOUD:  # some scale their head's input up
            model.get_output_embeddings().weight.data /= loud / LOUD
    model.save_pretrained(folder)


def logits_of(model: Any) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=torch.tensor([[5, 9, 30, 7, 200, 41]])).logits
    return logits


def tiny_config(kind: str, variation: dict[str, Any], tokens: int) -> Any:
    """Return the config of a type with small sizes."""
    from transformers import CONFIG_MAPPING

    config_class = CONFIG_MAPPING[kind]
    try:
        usual = config_class()
    except Exception:  # a drafter's defaults contradict its own rules
        usual = config_class(**copy.deepcopy(OWN[kind]))
    facts = shrunk(usual, variation, tokens, iter(range(tokens, tokens + SPARE_ROWS)))
    return config_class(**merged(facts, copy.deepcopy(OWN.get(kind, {}))))


def shrunk(config: Any, variation: dict[str, Any], tokens: int, spare: Iterator[int]) -> dict[str, Any]:
    """Return a config's own sizes shrunk, with those of its parts."""
    facts = {name: value for name, value in vars(config).items() if not name.startswith("_")}
    small = SMALL | variation
    layers = int(getattr(config, "num_hidden_layers", None) or 0)
    places = chosen_layers(config, layers, small["num_hidden_layers"])
    found: dict[str, Any] = {name: tokens + SPARE_ROWS for name in facts if name.startswith("vocab_size")}
    for name, value in facts.items():
        if name in config.sub_configs:
            if hasattr(value, "to_dict"):
                found[name] = {"model_type": value.model_type} | shrunk(value, variation, tokens, spare)
        elif isinstance(value, bool) or name.startswith("vocab_size"):
            continue
        elif value is None and "fill" in variation and name in small:
            found[name] = small[name]
        elif isinstance(value, int) and name.endswith(("_token_id", "_token_index", "_id")):
            found[name] = SPECIAL[name] if name in SPECIAL else next(spare)
        elif isinstance(value, int) and name in small:
            found[name] = min(value, small[name]) if value else value
        elif isinstance(value, (list, tuple)) and layers and len(value) == layers:
            found[name] = [value[place] for place in places]
        elif isinstance(value, dict) and "mrope_section" in value:
            found[name] = value | {"mrope_section": [2, 3, 3]}
    if layers:
        found["num_hidden_layers"] = len(places)
    return found


def chosen_layers(config: Any, layers: int, count: int) -> list[int]:
    """Return the layers to keep: the first of each kind, and as many more."""
    kinds = getattr(config, "layer_types", None) or [""] * layers
    first = [place for place, kind in enumerate(kinds) if kind not in kinds[:place]]
    rest = [place for place in range(layers) if place not in first]
    return sorted(first + rest[: max(count - len(first), 0)])


def merged(facts: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    """Return facts with more facts over them, part by part."""
    out = dict(facts)
    for name, value in more.items():
        out[name] = merged(out[name], value) if isinstance(value, dict) and isinstance(out.get(name), dict) else value
    return out


def plain(folder: Path) -> Any:
    """Open a folder as the class that its config names, with transformers alone."""
    import transformers

    name = json.loads((folder / "config.json").read_text())["architectures"][0]
    return getattr(transformers, name).from_pretrained(folder, dtype=torch.float32).eval()
