"""LLaMA's own files and a Hugging Face folder are the same model, both ways, to the bit."""

from __future__ import annotations

import json
import pickle
import shutil
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import PreTrainedTokenizerFast

from tests.adapters import make_adapter
from tests.conftest import SHARED, tensors, tiny_llama
from tests.export.originals import LAYERS, SIZES, WIDTH, make_original
from tests.model.loading.pickle_bomb import Bomb


def load_all(folder: Path) -> list[dict[str, torch.Tensor]]:
    return [
        {name: tensor for name, tensor in torch.load(file, weights_only=True).items() if name != "rope.freqs"}
        for file in sorted(folder.glob("consolidated.*.pth"))
    ]


@pytest.mark.parametrize("size", SIZES)
def test_pth_round_trip_is_bit_identical(
    size: str, tmp_path: Path, tongwen: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_original(tmp_path / "pth", size)
    monkeypatch.setattr("tongwen.export.pth.FILES_BY_WIDTH", {WIDTH: SIZES[size][2]})
    assert tongwen("convert", tmp_path / "pth", "--to", "hf", "--out", tmp_path / "hf")[0] == 0
    assert tongwen("convert", tmp_path / "hf", "--to", "pth", "--out", tmp_path / "back")[0] == 0
    before, after = load_all(tmp_path / "pth"), load_all(tmp_path / "back")
    assert len(before) == len(after) == SIZES[size][2]
    for one, other in zip(before, after, strict=True):
        assert one.keys() == other.keys()
        for name in one:
            if name == "tok_embeddings.weight" and "rope_theta" in SIZES[size][5]:
                continue  # LLaMA-3 slices it by rows; compared whole below
            assert torch.equal(one[name], other[name]), name
    assert tongwen("convert", tmp_path / "back", "--to", "hf", "--out", tmp_path / "again")[0] == 0
    one, other = tensors(tmp_path / "hf"), tensors(tmp_path / "again")
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    manifests = [json.loads((tmp_path / name / "manifest.json").read_text()) for name in ("hf", "again")]
    assert manifests[0]["fingerprint"] == manifests[1]["fingerprint"]
    for part in sorted((tmp_path / "back").glob("*.pth")):
        assert zipfile.ZipFile(part).testzip() is None, "the zip's own checksums hold"
    params = json.loads((tmp_path / "back" / "params.json").read_text())
    assert params["n_heads"] == SIZES[size][0] and params["dim"] == WIDTH
    assert {key: params.get(key) for key in ("rope_theta", "use_scaled_rope")} == {
        key: SIZES[size][5].get(key) for key in ("rope_theta", "use_scaled_rope")
    }


def test_converted_model_matches_llama_reference_code(tmp_path: Path, tongwen: Any) -> None:
    """Rotation by complex pairs, as in the published code, against transformers on the converted folder."""
    from transformers import AutoModelForCausalLM

    make_original(tmp_path / "pth", "LLaMA-3 8B", torch.float32)
    assert tongwen("convert", tmp_path / "pth", "--to", "hf", "--out", tmp_path / "hf")[0] == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    (state,) = load_all(tmp_path / "pth")
    ids = torch.arange(3, 20)
    with torch.no_grad():
        found = model(ids[None]).logits[0]
    assert torch.allclose(found, reference(state, ids), atol=2e-3, rtol=1e-4)


def reference(state: dict[str, torch.Tensor], ids: torch.Tensor) -> torch.Tensor:
    heads, groups, _, _, epsilon, more = SIZES["LLaMA-3 8B"]
    width, length = WIDTH // heads, len(ids)
    angles = torch.outer(torch.arange(length).float(), more["rope_theta"] ** (-torch.arange(0, width, 2) / width))
    turn = torch.polar(torch.ones_like(angles), angles)[:, None]

    def norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + epsilon) * weight

    def turned(x: torch.Tensor) -> torch.Tensor:
        pairs = torch.view_as_complex(x.reshape(length, -1, width // 2, 2))
        return torch.view_as_real(pairs * turn).flatten(2)

    x = state["tok_embeddings.weight"][ids]
    for layer in range(LAYERS):
        w = {name.split(".", 2)[2]: part for name, part in state.items() if name.startswith(f"layers.{layer}.")}
        h = norm(x, w["attention_norm.weight"])
        q, k, v = (h @ w[f"attention.w{name}.weight"].T for name in "qkv")
        q, k = turned(q.view(length, heads, width)), turned(k.view(length, groups, width))
        k, v = (part.view(length, groups, width).repeat_interleave(heads // groups, 1) for part in (k, v))
        mixed = torch.nn.functional.scaled_dot_product_attention(
            *(part.transpose(0, 1) for part in (q, k, v)), is_causal=True
        )
        x = x + mixed.transpose(0, 1).flatten(1) @ w["attention.wo.weight"].T
        h = norm(x, w["ffn_norm.weight"])
        gate = torch.nn.functional.silu(h @ w["feed_forward.w1.weight"].T) * (h @ w["feed_forward.w3.weight"].T)
        x = x + gate @ w["feed_forward.w2.weight"].T
    return norm(x, state["norm.weight"]) @ state["output.weight"].T


def test_merge_writes_pth(chat_model: Path, tmp_path: Path, tongwen: Any) -> None:
    make_adapter(chat_model, tmp_path / "adapter")
    argv = ("merge", "--base", chat_model, "--adapter", tmp_path / "adapter")
    assert tongwen(*argv, "--out", tmp_path / "hf")[0] == 0
    assert tongwen(*argv, "--out", tmp_path / "pth", "--to", "pth")[0] == 0
    assert sorted(file.name for file in (tmp_path / "pth").iterdir()) == [
        "consolidated.00.pth",
        "manifest.json",
        "params.json",
    ]
    assert tongwen("convert", tmp_path / "hf", "--to", "pth", "--out", tmp_path / "other")[0] == 0
    one, other = load_all(tmp_path / "pth")[0], load_all(tmp_path / "other")[0]
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_merge_finds_the_sentencepiece_model_of_its_vocabulary(tmp_path: Path, tongwen: Any) -> None:
    """Training leaves tokenizer.json alone; the base's tokenizer.model belongs to it only where the pieces are the same."""
    from transformers import AutoTokenizer

    from tongwen.model.loading import sentencepiece
    from tongwen.vocab.train import train_sentencepiece

    base, adapter = tmp_path / "base", tmp_path / "adapter"
    texts = ["the weather is fine today", "all of us like to read", "use the same words again"] * 9
    held = train_sentencepiece(texts, 290, "bpe", 0)
    model = sentencepiece.parse(held, "model")
    tiny_llama(base, len(model.pieces))
    (base / "tokenizer.model").write_bytes(held)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=sentencepiece.fast_form(model), **sentencepiece.special_names(model)
    )
    make_adapter(base, adapter)
    fast.save_pretrained(adapter)
    argv = ("merge", "--base", base, "--adapter", adapter, "--to", "pth")
    assert tongwen(*argv, "--out", tmp_path / "pth")[0] == 0
    assert (tmp_path / "pth" / "tokenizer.model").read_bytes() == held
    assert tongwen("convert", tmp_path / "pth", "--to", "hf", "--out", tmp_path / "hf")[0] == 0
    back = AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert back("the same weather").input_ids == fast("the same weather").input_ids
    (base / "tokenizer.model").write_bytes(train_sentencepiece(texts[::-1], 280, "bpe", 0))
    code, out, err = tongwen(*argv, "--out", tmp_path / "other")
    assert code == 0 and "has no tokenizer.model: none has the pieces of this vocabulary" in out + err
    assert not (tmp_path / "other" / "tokenizer.model").exists()


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs LLaMA's tokenizer")
def test_llama_tokenizer_keeps_its_special_tokens(tmp_path: Path, tongwen: Any) -> None:
    from transformers import AutoTokenizer

    make_original(tmp_path / "pth", "7B")
    model = SHARED / "tokenizers" / "llama.model"
    (tmp_path / "tokenizer.model").write_bytes(model.read_bytes())  # one folder up, as in LLaMA's download
    assert tongwen("convert", tmp_path / "pth", "--to", "hf", "--out", tmp_path / "hf")[0] == 0
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (1, 2, 0)
    assert tokenizer("Hello 1000")["input_ids"] == [1, 15043, 29871, 29896, 29900, 29900, 29900]


def without_a_part(folder: Path) -> None:
    (folder / "consolidated.00.pth").unlink()


def with_a_bomb(folder: Path) -> None:
    torch.save({"x": Bomb(folder.parent / "canary")}, folder / "consolidated.00.pth")


def as_a_bare_bomb(folder: Path) -> None:
    (folder / "consolidated.01.pth").write_bytes(pickle.dumps(Bomb(folder.parent / "canary")))


def without_params(folder: Path) -> None:
    (folder / "params.json").unlink()


def with_hostile_params(folder: Path) -> None:
    params = json.loads((folder / "params.json").read_text())
    (folder / "params.json").write_text(json.dumps({**params, "n_layers": 10**9}))


def without_a_tensor(folder: Path) -> None:
    state = torch.load(folder / "consolidated.01.pth", weights_only=True)
    state.pop("layers.1.attention.wk.weight")
    torch.save(state, folder / "consolidated.01.pth")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (without_a_part, "consolidated.00.pth"),
        (with_a_bomb, "never opens"),
        (as_a_bare_bomb, "consolidated.01.pth"),
        (without_params, "no params.json"),
        (with_hostile_params, "n_layers is 1000000000"),
        (without_a_tensor, "layers.1.attention.wk.weight is missing"),
    ],
)
def test_bad_files_are_refused_by_name(spoil: Any, message: str, tmp_path: Path, tongwen: Any) -> None:
    make_original(tmp_path / "pth", "13B, 49953 rows")
    spoil(tmp_path / "pth")
    code, _, err = tongwen("convert", tmp_path / "pth", "--to", "hf", "--out", tmp_path / "out")
    assert code == 4 and message in err, err
    assert not (tmp_path / "out").exists() and not (tmp_path / "canary").exists()


def test_unsupported_architecture_is_refused(tmp_path: Path, tongwen: Any) -> None:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    Qwen2ForCausalLM(Qwen2Config(vocab_size=60, **shape)).save_pretrained(tmp_path / "qwen")
    code, _, err = tongwen("convert", tmp_path / "qwen", "--to", "pth", "--out", tmp_path / "out")
    assert code == 4 and "qwen2" in err and "--to hf" in err


def test_merge_onto_pth_suggests_convert(chat_model: Path, tmp_path: Path, tongwen: Any) -> None:
    make_original(tmp_path / "pth", "7B")
    make_adapter(chat_model, tmp_path / "adapter")
    argv = ("merge", "--base", tmp_path / "pth", "--adapter", tmp_path / "adapter", "--out", tmp_path / "out")
    code, _, err = tongwen(*argv)
    assert code == 4 and f"tongwen convert {tmp_path / 'pth'} --to hf" in err


def test_rotary_frequencies_of_old_files_are_ignored(chat_model: Path, tmp_path: Path, tongwen: Any) -> None:
    folder = tmp_path / "old"
    shutil.copytree(chat_model, folder)
    state = {**tensors(folder), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    save_file(state, folder / "model.safetensors")
    assert tongwen("convert", folder, "--to", "pth", "--out", tmp_path / "one")[0] == 0
    assert tongwen("convert", chat_model, "--to", "pth", "--out", tmp_path / "other")[0] == 0
    one, other = load_all(tmp_path / "one")[0], load_all(tmp_path / "other")[0]
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_tied_head_is_written_out(chat_model: Path, tmp_path: Path, tongwen: Any) -> None:
    assert tongwen("convert", chat_model, "--to", "pth", "--out", tmp_path / "pth")[0] == 0
    (state,) = load_all(tmp_path / "pth")
    assert torch.equal(state["output.weight"], state["tok_embeddings.weight"])


def test_same_model_gives_the_same_bytes_at_any_time(
    tmp_path: Path, tongwen: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import time

    make_original(tmp_path / "original", "13B, 49953 rows")
    tongwen("convert", tmp_path / "original", "--to", "hf", "--out", tmp_path / "hf")
    now = time.time()
    for number in range(2):
        monkeypatch.setattr(time, "time", lambda number=number: now + number * 1e6)
        assert tongwen("convert", tmp_path / "hf", "--to", "pth", "--out", tmp_path / f"{number}")[0] == 0
    files = sorted(file.name for file in (tmp_path / "0").iterdir() if file.name != "manifest.json")
    assert files == ["consolidated.00.pth", "params.json"]
    for name in files:
        assert (tmp_path / "0" / name).read_bytes() == (tmp_path / "1" / name).read_bytes(), name
