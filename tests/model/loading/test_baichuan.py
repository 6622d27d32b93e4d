"""Baichuan-7B is converted to LLaMA with a notice; its code is never run, and other Baichuan models are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer

from tests.conftest import CORPUS, tiny_llama
from tongwen.model.loading import load
from tongwen.model.loading.locate import locate
from tongwen.model.loading.tokenizer import load_tokenizer

FUSED = "model.layers.{}.self_attn.W_pack.weight"


@pytest.fixture()
def baichuan(tmp_path: Path) -> Path:
    """As it is on the hub: three projections in one matrix, code beside it, SentencePiece's file."""
    folder = tmp_path / "Baichuan-7B"
    folder.mkdir()
    (tmp_path / "text").write_text("\n".join(CORPUS), encoding="utf-8")
    SentencePieceTrainer.train(
        input=str(tmp_path / "text"),
        model_prefix=str(folder / "tokenizer"),
        model_type="bpe",
        vocab_size=420,
        byte_fallback=True,
        normalization_rule_name="identity",
        minloglevel=2,
    )
    tiny_llama(folder, 420, num_key_value_heads=4, tie_word_embeddings=False)
    held = load_file(folder / "model.safetensors")
    for layer in range(2):
        names = [f"model.layers.{layer}.self_attn.{part}_proj.weight" for part in "qkv"]
        held[FUSED.format(layer)] = torch.cat([held.pop(name) for name in names])
    save_file(held, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    auto_map = {"AutoConfig": "configuration_baichuan.BaiChuanConfig"}
    config |= {"model_type": "baichuan", "architectures": ["BaiChuanForCausalLM"], "auto_map": auto_map}
    (folder / "config.json").write_text(json.dumps(config))
    speech = {
        "tokenizer_class": "BaiChuanTokenizer",
        "add_bos_token": False,
        "auto_map": {"AutoTokenizer": ["tokenization_baichuan.X", None]},
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(speech))
    return folder


def test_baichuan_is_converted_to_llama(baichuan: Path, tmp_path: Path, tongwen: Any) -> None:
    code, _, err = tongwen("chat", baichuan)
    assert code == 4 and "never run" in err and f"tongwen convert {baichuan} --to hf --out Baichuan-7B-llama" in err
    made = tmp_path / "Baichuan-7B-llama"
    code, out, err = tongwen("convert", baichuan, "--to", "hf", "--out", made)
    assert code == 0, err
    assert "this Baichuan is a LLaMA in structure and is treated as one" in out + err
    tiny_llama(tmp_path / "plain", 420, num_key_value_heads=4, tie_word_embeddings=False)  # the same weights, unfused
    ids = torch.tensor([[7, 300, 12, 5]])
    models = [load.load_model(locate(str(place)), torch.float32).eval() for place in (tmp_path / "plain", made)]
    with torch.no_grad():
        torch.testing.assert_close(models[0](ids).logits, models[1](ids).logits, rtol=0, atol=0)
    tokenizer = load_tokenizer(locate(str(made)))
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<s>", "</s>")
    pieces = SentencePieceProcessor(model_file=str(baichuan / "tokenizer.model"))
    for text in CORPUS[:3]:
        assert tokenizer(text).input_ids == pieces.encode(text)


@pytest.mark.parametrize(
    ("config", "message"), [({"model_max_length": 4096}, "ALiBi"), ({"vocab_size": 125696}, "normalises its head")]
)
def test_other_baichuan_models_are_refused(
    config: dict[str, Any], message: str, baichuan: Path, tmp_path: Path, tongwen: Any
) -> None:
    held = json.loads((baichuan / "config.json").read_text())
    (baichuan / "config.json").write_text(json.dumps(held | config))
    code, _, err = tongwen("convert", baichuan, "--to", "hf", "--out", tmp_path / "out")
    assert code == 4 and message in err and "Baichuan-7B" in err
