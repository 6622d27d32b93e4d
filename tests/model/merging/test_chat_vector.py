"""Chat vectors: the difference of an instruct model and its base, added to another model of that base."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import byte_level_tokenizer, tensors, tiny_llama

TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"


def family(folder: Path, dtype: torch.dtype = torch.bfloat16) -> tuple[Path, Path, Path]:
    """(target with eight more rows, instruct, base): the last two differ by small noise, and the first from them."""
    places = tuple(folder / name for name in ("target", "instruct", "base"))
    for seed, place in enumerate(places):
        tokenizer = byte_level_tokenizer(place)
        if seed == 0:
            tokenizer.add_tokens([f"词{number}" for number in range(8)])
        if seed == 1:
            tokenizer.chat_template = TEMPLATE
        tokenizer.save_pretrained(str(place))
        model = tiny_llama(place, len(tokenizer), seed=9)
        torch.manual_seed(seed)
        with torch.no_grad():
            for part in model.parameters():
                part.add_(torch.randn_like(part) * 0.01 * seed)
        model.to(dtype).save_pretrained(str(place))
    return places[0], places[1], places[2]


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_chat_vector_is_the_difference_rounded_once(tongwen: Any, tmp_path: Path, scale: float) -> None:
    target, instruct, base = family(tmp_path)
    out = tmp_path / "out"
    command = ("merge", "--base", target, "--chat-vector", instruct, base, "--scale", scale, "--out", out)
    code, stdout, err = tongwen(*command)
    assert code == 0, err
    assert "8 rows" in stdout
    ours, theirs, old, made = (tensors(place) for place in (target, instruct, base, out))
    assert made.keys() == ours.keys()
    for name, tensor in made.items():
        rows = len(old[name])
        wanted = ours[name].float()
        wanted[:rows] += scale * (theirs[name].float() - old[name].float())
        assert torch.equal(tensor, wanted.to(torch.bfloat16)), name
        assert torch.equal(tensor[rows:], ours[name][rows:])
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(out))
    assert tokenizer.chat_template == TEMPLATE and "词3" in tokenizer.get_vocab()
    assert tongwen("verify", out)[0] == 0
    code, _, err = tongwen(*command)
    assert code == 2 and "--again" in err

    import tongwen as package

    assert isinstance(package.open(str(out)).chat([{"role": "user", "content": "你好"}], max_new_tokens=4), str)


def test_unrelated_models_are_refused(tongwen: Any, tmp_path: Path) -> None:
    target, instruct, base = family(tmp_path)
    out, other = tmp_path / "out", tmp_path / "other"
    tiny_llama(other, len(byte_level_tokenizer(other)), hidden_size=48)
    merge = ("merge", "--out", out, "--base")
    for arguments, code, message in (
        ((target, "--chat-vector", base, base), 4, "same"),
        ((target, "--chat-vector", instruct, other), 4, "different families"),
        ((target,), 2, "--chat-vector"),
        ((target, "--chat-vector", instruct, base, "--adapter", base), 2, "either"),
        (
            (base, "--chat-vector", target, target),
            4,
            "different families",
        ),  # a smaller vocabulary than the difference has
    ):
        found, _, err = tongwen(*merge, *arguments)
        assert found == code and message in err and not out.exists(), err


def test_control_token_with_another_id_is_refused(tongwen: Any, tmp_path: Path) -> None:
    target, instruct, base = family(tmp_path)
    file = instruct / "tokenizer.json"
    held = json.loads(file.read_text())
    vocabulary = held["model"]["vocab"]
    start, end = vocabulary["<|im_start|>"], vocabulary["<|im_end|>"]
    vocabulary["<|im_start|>"], vocabulary["<|im_end|>"] = end, start
    for token in held["added_tokens"]:
        token["id"] = vocabulary[token["content"]]
    file.write_text(json.dumps(held))
    code, _, err = tongwen("merge", "--base", target, "--chat-vector", instruct, base, "--out", tmp_path / "out")
    assert code == 4 and "<|im_" in err
