"""Architectures beyond the table of families: trained, merged, and compared with peft's live model, or refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import byte_level_tokenizer, dialogues, tensors, write_recipe

SHAPE: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
SHAPE |= {"num_key_value_heads": 2, "max_position_embeddings": 512, "pad_token_id": None, "head_dim": 16}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
LINEAR = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16}
LINEAR |= {"linear_value_head_dim": 16, "layer_types": ["linear_attention", "full_attention"]}
TOWER = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
TOWER |= {"image_size": 56, "patch_size": 14}
QWEN_TOWER = {"depth": 1, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 64}
QWEN_TOWER |= {"num_position_embeddings": 16}
CAUSAL: dict[str, dict[str, Any]] = {
    "gpt_oss": SHAPE | {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8},
    "qwen3_5_moe_text": SHAPE | EXPERTS | LINEAR | {"shared_expert_intermediate_size": 32},
    "llama4_text": SHAPE | {"num_local_experts": 4, "num_experts_per_tok": 1, "intermediate_size_mlp": 128},
    "mamba2": {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "state_size": 8,
        "num_heads": 8,
        "head_dim": 16,
        "n_groups": 1,
    },
}
WRAPPED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "gemma3": (SHAPE, {"vision_config": TOWER, "mm_tokens_per_image": 4}),
    "mistral3": (
        SHAPE | {"model_type": "mistral"},
        {"vision_config": TOWER | {"model_type": "pixtral", "head_dim": 16}},
    ),
    "qwen3_5": (SHAPE | LINEAR, {"vision_config": QWEN_TOWER}),
    "qwen3_5_moe": (SHAPE | LINEAR | EXPERTS | {"shared_expert_intermediate_size": 32}, {"vision_config": QWEN_TOWER}),
}


def make_base(folder: Path, kind: str) -> Path:
    import transformers
    from transformers.models.auto import modeling_auto as auto

    tokenizer = byte_level_tokenizer(folder)
    ids = {"vocab_size": len(tokenizer) + 12, "bos_token_id": 1, "eos_token_id": 2}
    if kind in WRAPPED:
        text, rest = WRAPPED[kind]
        config = transformers.AutoConfig.for_model(kind, text_config=text | ids, **rest)
        name = auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES[kind]
    else:
        config = transformers.AutoConfig.for_model(kind, **CAUSAL[kind] | ids)
        name = str(auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[kind])
    torch.manual_seed(0)
    model = getattr(transformers, name)._from_config(config).to(torch.float32)
    with torch.no_grad():
        for part in model.parameters():
            part.add_(torch.randn_like(part) * 0.02)
    model.save_pretrained(folder)
    return folder


def plain(folder: Path) -> Any:
    """Open a folder as the class that its config names, with transformers alone."""
    import transformers

    name = json.loads((folder / "config.json").read_text())["architectures"][0]
    return getattr(transformers, name).from_pretrained(folder, dtype=torch.float32).eval()


@pytest.mark.sample("gpt_oss", "qwen3_5_moe_text", "gemma3", "qwen3_5_moe")
@pytest.mark.parametrize("kind", [*CAUSAL, *WRAPPED])
def test_merged_adapter_matches_peft(kind: str, tmp_path: Path, tongwen: Any) -> None:
    from peft import PeftModel

    base = make_base(tmp_path / "base", kind)
    recipe = write_recipe(tmp_path, base, rows=dialogues(10), sft=", stop_after: 2 steps")
    code, out, err = tongwen("run", recipe)
    assert code == 0, err
    assert ("cannot see each other" in out + err) != ("padded batches" in out + err)
    adapter, merged = tmp_path / "out" / "sft", tmp_path / "out" / "merge"
    ids = torch.tensor([[5, 9, 30, 7, 200, 41]])
    with torch.no_grad():
        live = PeftModel.from_pretrained(plain(base), str(adapter)).eval()(input_ids=ids).logits
        torch.testing.assert_close(plain(merged)(input_ids=ids).logits, live, rtol=0, atol=1e-5)
        assert float((live - plain(base)(input_ids=ids).logits).abs().max()) > 1e-3
    before, after = tensors(base), tensors(merged)
    assert set(before) == set(after)
    for name in before:
        if "vision" in name or "visual" in name or "projector" in name:
            assert torch.equal(before[name], after[name])


def test_full_training_keeps_the_vision_tower_and_architecture(tmp_path: Path, tongwen: Any) -> None:
    base = make_base(tmp_path / "base", "qwen3_5")
    recipe = write_recipe(tmp_path, base, rows=dialogues(10), sft=", stop_after: 1 steps", merge=False)
    recipe.write_text(recipe.read_text().replace("{rank: 4}", "{method: full}"))
    code, _, err = tongwen("run", recipe)
    assert code == 0, err
    before, after = tensors(base), tensors(tmp_path / "out" / "sft")
    assert set(before) == set(after)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert len(moved) > 10 and not [name for name in moved if "visual" in name]
    assert type(plain(tmp_path / "out" / "sft")) is type(plain(base))


def test_packing_false_uses_padded_batches(tmp_path: Path, chat_model: Path, tongwen: Any) -> None:
    code, out, err = tongwen("run", write_recipe(tmp_path, chat_model, sft=", stop_after: 1 steps, packing: false"))
    assert code == 0 and "padded batches: sft.packing: false" in out + err


@pytest.mark.parametrize(("kind", "architecture"), [("T5", "T5ForConditionalGeneration"), ("Bert", "BertForMaskedLM")])
def test_non_causal_model_is_refused_by_check(kind: str, architecture: str, tmp_path: Path, tongwen: Any) -> None:
    base = tmp_path / "base"
    base.mkdir()
    facts = {"model_type": kind.lower(), "architectures": [architecture], "is_encoder_decoder": kind == "T5"}
    (base / "config.json").write_text(json.dumps(facts))
    code, _, err = tongwen("check", write_recipe(tmp_path, base))
    assert code == 4 and architecture in err and "Traceback" not in err


def test_bidirectional_model_is_refused(tmp_path: Path, tongwen: Any) -> None:
    from transformers import BertConfig, BertLMHeadModel

    base = tmp_path / "base"
    rows = len(byte_level_tokenizer(base))
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    BertLMHeadModel(BertConfig(vocab_size=rows, initializer_range=0.3, **shape)).save_pretrained(base)
    code, _, err = tongwen("run", write_recipe(tmp_path, base, sft=", stop_after: 1 steps"))
    assert code == 6 and "later token" in err
