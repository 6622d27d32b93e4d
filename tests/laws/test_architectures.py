"""Architectures beyond the table of families: trained, merged, and compared with peft's live model, or refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from bench.families import MERGE_LIMIT, try_kind

from tests.architectures import make_base, plain
from tests.conftest import byte_level_tokenizer, dialogues, tensors, write_recipe
from tongwen.core.errors import NumbersError
from tongwen.train.audit import check_causal

CHAINED = [
    "aria",
    "bamba",
    "bloom",
    "deepseek_v4",
    "exaone4",
    "falcon_mamba",
    "gemma3",
    "gemma4",
    "glm4v",
    "gpt_oss",
    "granitemoehybrid",
    "laguna",
    "lfm2_moe",
    "llama4_text",
    "mamba2",
    "mistral3",
    "mistral_large4",
    "mllama",
    "nemotron_h",
    "nemotron",
    "phimoe",
    "qwen2_5_vl",
    "qwen3_5",
    "qwen3_5_moe",
    "qwen3_next",
]


@pytest.mark.sample("gpt_oss", "gemma3")
@pytest.mark.parametrize("kind", CHAINED)
def test_architecture_end_to_end(kind: str, tmp_path: Path) -> None:
    """bench/families.py runs the same for all of them."""
    found = try_kind(kind, tmp_path)
    assert found["outcome"] == "trained", found
    assert found["resumed"] and found["merge_difference"] <= MERGE_LIMIT and found["learned"] > 1e-3, found
    assert found["generated"] == "same", found
    before, after = tensors(tmp_path / "base"), tensors(tmp_path / "out" / "merge")
    assert set(before) == set(after)
    for name in before:
        if "vision" in name or "visual" in name or "projector" in name or "audio" in name:
            assert torch.equal(before[name], after[name])


def test_committed_matrix_has_no_failure() -> None:
    found = json.loads((Path(__file__).parents[2] / "bench" / "results" / "families.json").read_text())
    counts, architectures = found["counts"], found["architectures"]
    assert counts["tried"] >= 100 and counts.get("failed", 0) == 0
    assert counts["resumed to the bit"] == counts["generated as transformers"] == counts["trained"]
    trained = {kind: one["merge_difference"] for kind, one in architectures.items() if one["outcome"] == "trained"}
    assert max(trained.values()) <= MERGE_LIMIT


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


@pytest.mark.parametrize("command", ["check", "run"])
def test_quantised_base_is_refused_before_training(command: str, tmp_path: Path, tongwen: Any) -> None:
    """Its adapter could be trained for hours, but not merged: the stored tensors are not the weights."""
    base = make_base(tmp_path / "base", "gpt_oss")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "mxfp4"}}))
    code, _, err = tongwen(command, write_recipe(tmp_path, base))
    assert code == 4 and "quantised" in err and "use the original" in err
    assert not (tmp_path / "out" / "prepare").exists()


def test_bidirectional_model_is_refused(tmp_path: Path, tongwen: Any) -> None:
    from transformers import BertConfig, BertLMHeadModel

    base = tmp_path / "base"
    rows = len(byte_level_tokenizer(base))
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    BertLMHeadModel(BertConfig(vocab_size=rows, initializer_range=0.1, **shape)).save_pretrained(base)
    recipe = write_recipe(tmp_path, base, sft=", stop_after: 1 steps")
    code, _, err = tongwen("check", recipe)
    assert code == 4 and "does not predict the next token" in err
    config = json.loads((base / "config.json").read_text())
    del config["add_cross_attention"]  # as in older files, which do not say
    (base / "config.json").write_text(json.dumps(config))
    code, _, err = tongwen("run", recipe)
    assert code == 6 and "later token" in err


def test_early_look_at_a_short_answer_is_found() -> None:
    """Only the first score depends on a later token: replacing the second half of the answer does not show it."""

    def loss(_model: Any, batch: dict[str, Any]) -> tuple[None, torch.Tensor]:
        nats = torch.zeros(len(batch["rows"]))
        nats[0] = float(batch["input_ids"][0, batch["rows"][0] + 1])
        return None, nats

    batch = {"input_ids": torch.arange(10)[None], "rows": torch.tensor([5, 6, 7, 8])}
    with pytest.raises(NumbersError, match="later token"):
        check_causal(torch.nn.Linear(1, 1), batch, loss)


def test_model_that_requires_an_image_is_refused(tmp_path: Path, tongwen: Any) -> None:
    base = make_base(tmp_path / "base", "blip")
    recipe = write_recipe(tmp_path, base, sft=", stop_after: 1 steps")
    code, _, err = tongwen("check", recipe)
    assert code == 4 and "BlipForConditionalGeneration does not predict" in err
    config = json.loads((base / "config.json").read_text())
    del config["architectures"]  # as of a model that is not in the list
    (base / "config.json").write_text(json.dumps(config))
    code, _, err = tongwen("run", recipe)
    assert code == 4 and "cannot read a text alone" in err and "pixel_values" in err
