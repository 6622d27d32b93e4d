"""llama.cpp answers as transformers does, for every family that is exported, and for wrapped models' text part."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.conftest import CORPUS, byte_level_tokenizer
from tests.export.gguf_models import WRAPPED, check_greedy, check_refused, convert, make_model
from tongwen.export.gguf_architectures import ARCHITECTURES

pytest.importorskip("gguf")
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0}
LLAMA3 |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 32}
LONG_EXAONE = {"num_hidden_layers": 64, "sliding_window": 4096, "sliding_window_pattern": 4, "layer_types": None}
GEMMA4_EXPERTS = {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 32}
GEMMA4_SMALL = {"hidden_size_per_layer_input": 8, "num_kv_shared_layers": 2, "use_double_wide_mlp": True}
GEMMA4_SMALL |= {"layer_types": ["sliding_attention", "full_attention"] * 3}


def check_answers(folder: Path, model: Any, tokenizer: Any, out: Path, tongwen: Any) -> None:
    from tests.llamacpp import LlamaCpp

    there = LlamaCpp(convert(tongwen, folder, out, "f32"), threads=1)
    for line in dict.fromkeys(CORPUS[:3]):
        check_greedy(there, model, tokenizer(line)["input_ids"][:40], 24)


@pytest.mark.sample("mixtral", "qwen3_5_moe_text", "gpt_oss", "ernie4_5_moe", "gemma4_text", "qwen3_5")
@pytest.mark.parametrize("family", [*ARCHITECTURES, *WRAPPED])
def test_llama_cpp_matches_transformers(family: str, tmp_path: Path, tongwen: Any) -> None:
    pytest.importorskip("xllamacpp")
    folder = tmp_path / "model"
    tokenizer = byte_level_tokenizer(folder)
    model = make_model(folder, family, len(tokenizer) + 3)  # rows that no token owns
    check_answers(folder, model, tokenizer, tmp_path / "out", tongwen)


@pytest.mark.sample("gemma4_text-more0")
@pytest.mark.parametrize(
    ("family", "more"),
    [
        ("gemma4_text", GEMMA4_SMALL),
        ("gemma4_text", GEMMA4_EXPERTS),
        ("gemma4_text", {"attention_k_eq_v": True}),
        ("exaone4", LONG_EXAONE),
        ("exaone4", {"rope_parameters": LLAMA3}),
        ("llama4_text", {"rope_parameters": LLAMA3}),
        ("ministral3", {"rope_parameters": YARN | {"llama_4_scaling_beta": 0.1, "mscale_all_dim": 1.0, "mscale": 1.0}}),
        ("gpt_oss", {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}),
        (
            "hunyuan_v1_dense",
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "alpha": 50.0, "factor": 1.0}},
        ),
        ("qwen3_next", {"rope_parameters": YARN | {"partial_rotary_factor": 0.5}}),
        ("seed_oss", {"rope_parameters": YARN}),
        (
            "olmo3",
            {
                "rope_parameters": {
                    "full_attention": YARN,
                    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
                }
            },
        ),
        ("stablelm", {"use_parallel_residual": True}),
        ("olmo", {"clip_qkv": 0.3}),
        ("lfm2", {"block_auto_adjust_ff_dim": True, "block_multiple_of": 16}),
    ],
)
def test_family_settings_match_transformers(family: str, more: dict[str, Any], tmp_path: Path, tongwen: Any) -> None:
    pytest.importorskip("xllamacpp")
    folder = tmp_path / "model"
    tokenizer = byte_level_tokenizer(folder)
    model = make_model(folder, family, len(tokenizer) + 3, **more)
    check_answers(folder, model, tokenizer, tmp_path / "out", tongwen)


def test_fused_experts_are_exported_and_unused_layers_are_not(tmp_path: Path, tongwen: Any, capsys: Any) -> None:
    """As Qwen3.5 is published: experts in one tensor, a tower, and a layer for multi-token prediction."""
    pytest.importorskip("xllamacpp")
    folder = tmp_path / "model"
    tokenizer = byte_level_tokenizer(folder)
    model = make_model(folder, "qwen3_5_moe", len(tokenizer) + 3)
    held = {name: part for name, part in load_file(folder / "model.safetensors").items() if ".experts." not in name}
    for name, part in model.state_dict().items():
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            held[name] = part.contiguous()
    held["mtp.fc.weight"] = torch.zeros(64, 128)
    save_file(held, folder / "model.safetensors", metadata={"format": "pt"})
    code, text, err = tongwen("convert", folder, "--to", "gguf", "--quantize", "f32", "--out", tmp_path / "seen")
    assert code == 0, err
    towers = sum("visual" in name for name in held)
    assert f"{towers} tensors are not of the text part" in text and f"convert_hf_to_gguf.py --mmproj {folder}" in text
    assert "1 tensor for multi-token prediction" in text
    check_answers(folder, model, tokenizer, tmp_path / "out", tongwen)


OTHERWISE = [  # what llama.cpp fixes for a family, and what no file carries
    ("qwen2_moe", {"norm_topk_prob": True}, "norm_topk_prob: true"),
    ("qwen3_next", {"norm_topk_prob": False}, "norm_topk_prob: false"),
    ("qwen3_5_text", {"hidden_act": "gelu"}, 'hidden_act: "gelu"'),
    ("llama4_text", {"attn_scale": 0.2}, "attn_scale: 0.2"),
    ("exaone4", {"sliding_window": 16, "layer_types": ["sliding_attention"] * 2}, "layer_types"),
    ("minicpm3", {"scale_emb": 3}, "scale_emb: 3"),
    ("gpt_oss", {"layer_types": ["full_attention"] * 4}, "layer_types"),
    ("gpt_oss", {"swiglu_limit": 3.0}, "swiglu_limit: 3.0"),
    ("olmoe", {"num_key_value_heads": 2}, "num_key_value_heads: 2"),
    ("cohere2", {"rope_parameters": YARN}, "'yarn'"),
]


@pytest.mark.parametrize(("family", "more", "said"), OTHERWISE)
def test_config_that_llama_cpp_computes_differently_is_refused(
    family: str, more: dict[str, Any], said: str, tmp_path: Path, tongwen: Any
) -> None:
    check_refused(tmp_path, family, more, said, tongwen)


def test_every_stop_token_ends_the_answer(tmp_path: Path, tongwen: Any) -> None:
    """In the model's order: the first is llama.cpp's eos, which it appends and prints; each ends an answer."""
    pytest.importorskip("xllamacpp")
    import json

    import gguf

    from tests.llamacpp import LlamaCpp

    folder = tmp_path / "model"
    tokenizer = byte_level_tokenizer(folder)
    make_model(folder, "qwen3", len(tokenizer) + 3)
    ids = tokenizer(CORPUS[0])["input_ids"][:40]
    usual = LlamaCpp(convert(tongwen, folder, tmp_path / "usual", "f32"), threads=1).greedy(ids, 24)
    later = next(token for token in usual[4:] if token not in usual[:4])
    ends = [470, 471, later]
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    file = convert(tongwen, folder, tmp_path / "ended", "f32")
    fields = gguf.GGUFReader(str(file)).fields
    assert [fields[f"tokenizer.ggml.{name}_token_id"].contents() for name in ("eos", "eot", "eom")] == ends
    found = LlamaCpp(file, threads=1).greedy(ids, 24)
    assert found in (usual[: usual.index(later)], usual[: usual.index(later) + 1])
