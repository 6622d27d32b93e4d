"""`vocab.new_rows: matched`: the grown model says what the base says, and a tied head becomes a matrix of its own."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from tests.conftest import byte_level_tokenizer, dialogues, save_fast, tensors, tiny_llama, write_rows
from tongwen.vocab import matched

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
    assert after / before < 1.01  # the base never saw the line ends that the report scores, too; the rows have
    assert report["matched"]["unseen"] == 12  # the first two bytes of a character
    code, _, err = tongwen("run", write(tmp_path, bigram_model, "subtoken_mean"), "--again")
    assert code == 0, err
    assert nats(tmp_path / "out" / "vocab", texts) > base + 0.3 * entropy


CHINESE = [
    "机器学习使用数据训练模型，模型从数据中学习规律。",
    "语言模型根据上文预测下一个词，预测越准，模型越好。",
] * 40


@pytest.fixture
def tied(tmp_path: Path) -> Path:
    base = tmp_path / "base"
    tiny_llama(base, len(byte_level_tokenizer(base)))
    return base


def test_a_tied_head_is_untied_and_every_later_stage_takes_it(tied: Path, tmp_path: Path, tongwen: Any) -> None:
    rows = write_rows(tmp_path / "data.jsonl", dialogues(24))
    later = """pretrain:
  phases: [{train: new_rows, stop_after: 2 steps}, {train: lora+embeddings, stop_after: 1 steps}]
  adapter: {rank: 4}
  max_length: 64
  learning_rate: 1e-2
  precision: fp32
sft: {template: chatml, adapter: {rank: 4}, max_length: 256, stop_after: 1 steps, samples: 0, precision: fp32}
merge: {}
export: {formats: [gguf], quantize: f32}
"""
    texts = [f"{one}{place}" for place, one in enumerate(CHINESE)]
    recipe = write(tmp_path, tied, "matched, words: [Kubernetes], measure_bits: false", later, texts)
    recipe.write_text(recipe.read_text().replace("prepare: {", f"prepare: {{dialogues: {rows}, "))
    code, planned, err = tongwen("plan", recipe)
    assert code == 0 and "unties the head" in planned, err
    code, out, err = tongwen("run", recipe)
    assert code == 0 and "unties the head" in out + err, err
    grown, old = tensors(tmp_path / "out" / "vocab"), tensors(tied)
    merged = tensors(tmp_path / "out" / "merge")
    first = json.loads((tmp_path / "out" / "vocab" / "new_rows.json").read_text())[0]
    assert HEAD not in old and (grown[EMBEDDING][:first] == old[EMBEDDING]).all()
    moved = (grown[HEAD][:first] != old[EMBEDDING]).any(dim=1).nonzero()[:, 0].tolist()
    spelled = byte_level_tokenizer(tmp_path / "again").convert_ids_to_tokens(moved)
    assert moved and not any(one.isascii() for one in spelled), spelled
    assert (merged[HEAD][first:] != grown[HEAD][first:]).any()
    adapters = [word for stage in ("pretrain", "sft") for word in ("--adapter", tmp_path / "out" / stage)]
    code, _, err = tongwen("merge", "--base", tied, *adapters, "--out", tmp_path / "original")
    assert code == 0, err  # the adapter of `lora+embeddings` brings all rows: it stands on the tied base, too
    for name, tensor in tensors(tmp_path / "original").items():
        torch.testing.assert_close(tensor, merged[name], rtol=0, atol=1e-5)
    for folder in ("vocab", "merge"):
        assert json.loads((tmp_path / "out" / folder / "config.json").read_text())["tie_word_embeddings"] is False
        assert tongwen("verify", tmp_path / "out" / folder)[0] == 0
    from gguf import GGUFReader

    (file,) = (tmp_path / "out" / "export" / "gguf").glob("*.gguf")
    assert "output.weight" in {tensor.name for tensor in GGUFReader(str(file)).tensors}


def test_the_same_seed_gives_the_same_rows(tied: Path, tmp_path: Path, tongwen: Any) -> None:
    found = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        texts = [f"{one}{place}" for place, one in enumerate(CHINESE)]
        assert tongwen("run", write(tmp_path / name, tied, "matched, measure_bits: false", "", texts))[0] == 0
        found.append(json.loads((tmp_path / name / "out" / "vocab" / "manifest.json").read_text())["fingerprint"])
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("base", "said"),
    [("no text", "no text to match"), ("softcap", "changes what its head says"), ("memory", "not fit")],
)
def test_rows_that_cannot_be_matched_are_the_mean_with_a_notice(
    tied: Path, tmp_path: Path, tongwen: Any, base: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = write(tmp_path, tied, "matched", "", [f"{one}{place}" for place, one in enumerate(CHINESE)])
    if base == "no text":
        lines = [line for line in recipe.read_text().splitlines() if not line.startswith(("prepare", "vocab"))]
        recipe.write_text("\n".join([*lines, "vocab: {pieces: 0, words: [机器学习], new_rows: matched}"]))
    elif base == "softcap":
        from transformers import Gemma2Config, Gemma2ForCausalLM

        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
        count = len(byte_level_tokenizer(tied))
        Gemma2ForCausalLM(Gemma2Config(vocab_size=count, head_dim=8, num_key_value_heads=2, **sizes)).save_pretrained(
            tied
        )
    else:
        monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=1000))
    code, out, err = tongwen("run", recipe)
    assert code == 0 and said in out + err and "subtoken_mean" in out + err, err
    config = json.loads((tmp_path / "out" / "vocab" / "config.json").read_text())
    assert config.get("tie_word_embeddings", True) and HEAD not in tensors(tmp_path / "out" / "vocab")
    part = tongwen_parts(tmp_path / "out" / "vocab", tied)
    rows = tensors(tmp_path / "out" / "vocab")[EMBEDDING]
    for index, old in part.items():
        assert torch.allclose(rows[index], rows[old].mean(0), atol=1e-6)


def tongwen_parts(grown: Path, base: Path) -> dict[int, list[int]]:
    """Return the old ids of each new piece that is whole text."""
    from transformers import AutoTokenizer

    new, old = AutoTokenizer.from_pretrained(grown), AutoTokenizer.from_pretrained(base)
    spelled = {index: new.decode([index]) for index in json.loads((grown / "new_rows.json").read_text())}
    return {index: old(one)["input_ids"] for index, one in spelled.items() if "\ufffd" not in one}


def test_shares_of_a_first_token_sum_to_one() -> None:
    """The head says a piece with the first token's probability times its share; the rest and all others stay."""
    torch.manual_seed(0)
    states = torch.cat([torch.ones(200, 1), torch.randn(200, 7)], dim=1)
    bias = matched.bias_direction(states)
    head, parts = torch.randn(10, 8), [[3, 4], [3, 5], [7, 1]]
    counts = torch.tensor([5.0] * 10 + [20.0, 3.0, 0.0])
    shares, stays = matched.log_shares(counts, parts, 10)
    old = head.clone()
    for index, less in stays.items():
        old[index] += less * bias
    new = head[[3, 3, 7]] + shares[:, None] * bias
    before = torch.log_softmax(states @ head.T, dim=1).exp()
    after = torch.log_softmax(states @ torch.cat([old, new]).T, dim=1).exp()
    assert (after[:, [0, 1, 2, 4, 5, 6, 8, 9]] - before[:, [0, 1, 2, 4, 5, 6, 8, 9]]).abs().max() < 2e-3
    assert (after[:, [3, 10, 11]].sum(1) - before[:, 3]).abs().max() < 2e-3
    assert (after[:, 10] / after[:, 3] - 20.5 / 5.5).abs().max() < 0.05


def test_the_head_learns_which_piece_follows_what() -> None:
    """Two pieces begin with one token; which of them follows is a matter of the state, as the closed form cannot say."""
    generator = torch.Generator().manual_seed(0)
    signs = torch.randint(0, 2, (4000, 1), generator=generator) * 2.0 - 1
    states = torch.cat([torch.ones(4000, 1), signs, torch.randn(4000, 6, generator=generator)], dim=1)
    head, parts = torch.randn(10, 8, generator=generator), [[3, 4], [3, 5]]
    head[4], head[5] = -head[5], head[5]
    bias = matched.bias_direction(states)
    shares, stays = matched.log_shares(torch.tensor([1.0] * 10 + [50.0, 50.0]), parts, 10)
    rows = matched.HeadRows.closed_form(head, parts, range(10, 12), shares, stays, bias)
    targets = torch.where(signs[:, 0] > 0, 10, 11)

    def right(found: torch.Tensor) -> float:
        logits = states @ torch.cat([head[:3], found[:1], head[4:], found[1:]]).T
        return float(-torch.nn.functional.cross_entropy(logits, targets))

    found = matched.fit(rows, head, states, targets)
    assert right(found) > right(rows.start) + 0.1
    untold = torch.randint(10, 12, (4000,), generator=generator)
    nothing = matched.fit(rows, head, states[:40], untold[:40])
    last = torch.cat([head[:3], nothing[:1], head[4:], nothing[1:]])
    start = torch.cat([head[:3], rows.start[:1], head[4:], rows.start[1:]])
    assert torch.nn.functional.cross_entropy(
        states[36:40] @ last.T, untold[36:40]
    ) <= torch.nn.functional.cross_entropy(states[36:40] @ start.T, untold[36:40])
