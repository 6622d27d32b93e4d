"""Wrong special tokens of a folder are corrected for training and chat, and its files stay unchanged (F-11, F-12, F-15)."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import dialogues, sentencepiece_tokenizer, tiny_llama, write_recipe
from tongwen.model.loading import load
from tongwen.model.loading.locate import locate


@pytest.fixture()
def first_conversion(tmp_path: Path) -> Path:
    """As the first LLaMA conversions stood on the hub."""
    folder = tmp_path / "llama-7b-hf"
    tokenizer = sentencepiece_tokenizer(folder)
    tiny_llama(folder, len(tokenizer))
    wrong = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": -1}
    for name in ("config.json", "generation_config.json"):
        held = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(held | wrong))
    empty = {"bos_token": "", "eos_token": "", "unk_token": "", "tokenizer_class": "LlamaTokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(empty))
    return folder


def hashes(folder: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.iterdir()}


def test_early_llama_conversion_learns_to_stop(first_conversion: Path, tmp_path: Path, tongwen: Any) -> None:
    before = hashes(first_conversion)
    recipe = write_recipe(tmp_path, first_conversion, rows=dialogues(12))
    recipe.write_text(recipe.read_text().replace("template: chatml", "template: plain"))
    code, out, err = tongwen("run", recipe)
    assert code == 0, err
    output = out + err
    assert "bos_token, eos_token, unk_token are empty; using <s>, </s>, <unk> instead" in output
    for name in ("config.json", "generation_config.json"):
        assert f"{name} has pad_token_id -1, but the vocabulary has 355 tokens" in output
    assert "would end with token 1 (<s>)" in output and "own end token: 2 (</s>)" in output
    manifest = json.loads((tmp_path / "out" / "sft" / "manifest.json").read_text())
    assert manifest["stop_tokens"] == ["</s>"]
    saved = json.loads((tmp_path / "out" / "merge" / "generation_config.json").read_text())
    assert saved["eos_token_id"] == 2 and saved["pad_token_id"] == 2
    assert hashes(first_conversion) == before


def test_invalid_pad_token_freezes_no_row(first_conversion: Path) -> None:
    """torch takes -1 for the last row, whose gradient then stays zero."""
    model = load.load_model(locate(str(first_conversion)), torch.float32)
    last = model.get_input_embeddings().weight.shape[0] - 1
    model(torch.tensor([[last, 5, last]])).logits.sum().backward()
    assert float(model.get_input_embeddings().weight.grad[last].abs().max()) > 0
    assert model.get_input_embeddings().padding_idx is None
