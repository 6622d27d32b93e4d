"""`vocab.new_rows: matched`: the grown model says what the base says, and a tied head becomes a matrix of its own."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from tests.conftest import save_fast, tiny_llama

# No two share the second or the third byte: see `bigram_model`.
CHARACTERS = [bytes([0xE5 + place % 4, 0x80 + place, 0xA0 + place]).decode() for place in range(12)]
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def text(random_: random.Random, size: int) -> str:
    return "".join(random_.choices(CHARACTERS, weights=range(8, 8 + len(CHARACTERS)), k=size))


@pytest.fixture(scope="module")
def bigram_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base that spells in bytes and knows the true probability of the next one: its rows are one-hot, its layers do
    nothing, its head is a table. Its texts are characters drawn independently, of which each byte but the first names one
    alone; so the probability of a whole character after another is the product of the table's."""
    folder = tmp_path_factory.mktemp("bigrams")
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        special_tokens=["<s>"], initial_alphabet=alphabet, vocab_size=257, show_progress=False
    )
    backend.train_from_iterator([""], trainer)
    tokenizer = save_fast(backend, folder, bos_token="<s>", eos_token="<s>", pad_token="<s>")
    size = 320
    model = tiny_llama(
        folder, size, hidden_size=size, tie_word_embeddings=False, num_attention_heads=5, num_key_value_heads=5
    )
    ids = torch.tensor(tokenizer(text(random.Random(1), 60_000), add_special_tokens=False)["input_ids"])
    table = torch.bincount(ids[:-1] * size + ids[1:], minlength=size * size).reshape(size, size) + 1e-9
    table[0] = table[ids[2::3].unique()].sum(0)  # a text begins with any character
    table /= table.sum(1, keepdim=True)
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(torch.eye(size))
        model.lm_head.weight.copy_(table.log().T / math.sqrt(size))  # the norm makes sqrt(size) of 1
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
    model.save_pretrained(folder)
    return folder


def write(folder: Path, base: Path, vocab: str, more: str = "", texts: list[str] | None = None) -> Path:
    random_ = random.Random(2)
    texts = texts or [text(random_, 60) for _ in range(120)]
    (folder / "zh.txt").write_text("\n".join(texts), encoding="utf-8")
    recipe = folder / "recipe.yaml"
    recipe.write_text(
        f"name: v\nbase: {base}\nout: {folder / 'out'}\n"
        f"prepare: {{documents: {folder / 'zh.txt'}, held_out: 20, dedup: {{documents: 'off'}}}}\n"
        f"vocab: {{pieces: 24, new_rows: {vocab}}}\n{more}",
        encoding="utf-8",
    )
    return recipe


def nats(folder: Path, texts: list[str]) -> float:
    """The mean nats of a text, by transformers alone."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    total = 0.0
    for one in texts:
        ids = torch.tensor([[0, *tokenizer(one, add_special_tokens=False)["input_ids"]]])
        total += float(model(ids, labels=ids).loss.detach()) * (ids.shape[1] - 1)
    return total / len(texts)


def test_a_grown_model_says_what_the_base_says(bigram_model: Path, tmp_path: Path, tongwen: Any) -> None:
    code, _, err = tongwen("run", write(tmp_path, bigram_model, "matched"))
    assert code == 0, err
    texts = [text(random.Random(place), 40) for place in range(3, 13)]
    base, grown = nats(bigram_model, texts), nats(tmp_path / "out" / "vocab", texts)
    entropy = 40 * math.log(len(CHARACTERS))
    assert abs(grown - base) < 0.02 * entropy, (base, grown)
    report = json.loads((tmp_path / "out" / "vocab" / "report.json").read_text())
    before, after, *_english = report["bits_per_byte"].values()
    assert abs(after / before - 1) < 0.04 and report["matched"]["unseen"] == 12  # the first two bytes of a character
    code, _, err = tongwen("run", write(tmp_path, bigram_model, "subtoken_mean"), "--again")
    assert code == 0, err
    assert nats(tmp_path / "out" / "vocab", texts) > base + 0.3 * entropy
