"""Combining adapters, and merging onto the dequantised base of a quantised training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.adapters import logits, make_adapter, merged
from tests.conftest import tensors, tiny_llama
from tongwen.model.merging.combine import find_cut

UP = "model.layers.1.mlp.up_proj.weight"


def two_adapters(base: Path, folder: Path, **options: Any) -> list[Path]:
    for number in (1, 2):
        make_adapter(base, folder / f"a{number}", seed=number, r=3 + number, **options)
    return [folder / "a1", folder / "a2"]


def changes(base: Path, adapters: list[Path], name: str) -> list[torch.Tensor]:
    """What peft makes of each adapter alone."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    old, out = tensors(base)[name].double(), []
    for adapter in adapters:
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64)
        folded = PeftModel.from_pretrained(model, adapter).merge_and_unload().state_dict()
        out.append(folded[name].double() - old)
    return out


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"modules_to_save": ["embed_tokens"]}])
def test_linear_matches_the_weighted_sum(
    options: dict[str, Any], chat_model: Path, tmp_path: Path, tongwen: Any
) -> None:
    adapters = two_adapters(chat_model, tmp_path, **options)
    arguments = ("--combine", "linear", "--weight", "0.75", "--weight", "0.5", "--scale", "2")
    out = merged(tongwen, chat_model, adapters, tmp_path / "out", *arguments)
    one, other = changes(chat_model, adapters, UP)
    expected = tensors(chat_model)[UP] + 2 * (0.75 * one + 0.5 * other)
    assert torch.allclose(tensors(out)[UP].double(), expected, atol=1e-7)
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["settings"]["mix"]["weights"] == {str(adapters[0]): 0.75, str(adapters[1]): 0.5}
    assert manifest["parity"]["relative"] < 1e-5


def test_linear_matches_peft_cat(chat_model: Path, tmp_path: Path, tongwen: Any) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    adapters = two_adapters(chat_model, tmp_path)
    out = merged(tongwen, chat_model, adapters, tmp_path / "out", "--combine", "linear")
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(chat_model), adapters[0], "one")
    model.load_adapter(adapters[1], "two")
    model.add_weighted_adapter(["one", "two"], [0.5, 0.5], "both", combination_type="cat")
    model.set_adapter("both")
    assert torch.allclose(logits(AutoModelForCausalLM.from_pretrained(out)), logits(model), atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ties_matches_peft(dtype: torch.dtype, tmp_path: Path, tongwen: Any) -> None:
    from peft.utils.merge_utils import ties

    base = tmp_path / "base"
    tiny_llama(tmp_path / "fp32", 90).to(dtype).save_pretrained(base)
    adapters = two_adapters(base, tmp_path)
    out = merged(tongwen, base, adapters, tmp_path / "out", "--combine", "ties", "--density", "0.3")
    added = ties(changes(base, adapters, UP), torch.ones(2), 0.3, "total")
    expected = (tensors(base)[UP].double() + added).to(dtype)
    apart = ~torch.isclose(tensors(out)[UP], expected, atol=1e-7)
    assert int(apart.sum()) <= 2  # of each adapter peft keeps int(density x n) numbers, this keeps the nearest number
    assert 0.3 < float((added == 0).double().mean()) < 0.7


def test_threshold_is_the_kth_largest() -> None:
    numbers = np.abs(np.random.default_rng(0).standard_normal((40, 25)).astype(np.float32))
    numbers[:, 3] = 0
    for keep in (1, 7, 400, 960, 1000):
        cut = find_cut(lambda: (numbers[at : at + 9] for at in range(0, 40, 9)), keep)
        assert cut == np.sort(numbers.reshape(-1))[-keep]


def test_incompatible_adapters_are_refused(chat_model: Path, tmp_path: Path, tongwen: Any) -> None:
    one, other = two_adapters(chat_model, tmp_path)
    rows = tensors(chat_model)["model.embed_tokens.weight"].shape[0]
    tiny_llama(tmp_path / "larger", rows + 3)
    make_adapter(tmp_path / "larger", tmp_path / "grown", modules_to_save=["embed_tokens"], ensure_weight_tying=True)
    command = ("merge", "--base", chat_model, "--out", tmp_path / "out", "--combine", "ties")
    for arguments, wrong, remedy in (
        (["--adapter", one], "at least two adapters", "--adapter A2"),
        (["--adapter", one, "--adapter", one], "each once", "--adapter A2"),
        (["--adapter", one, "--adapter", other, "--weight", 1], "1 weights given for 2", "--weight"),
        (["--adapter", one, "--adapter", other, "--density", 0], "density 0 must be above 0 and at most 1", ""),
        (["--adapter", one, "--adapter", tmp_path / "grown"], "its own vocabulary", "first"),
    ):
        code, _, err = tongwen(*command, *arguments)
        assert code in (2, 4) and wrong in err and remedy in err, err
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_merge_uses_the_dequantised_training_base(kind: str, tmp_path: Path, tongwen: Any) -> None:
    functional = pytest.importorskip("bitsandbytes").functional
    from tongwen.model.loading.load import load_model
    from tongwen.model.loading.model_ref import ModelRef

    base = tmp_path / "base"
    tiny_llama(base, 90, hidden_size=64, intermediate_size=128)
    make_adapter(base, tmp_path / "a")
    out = merged(tongwen, base, [tmp_path / "a"], tmp_path / "out", "--onto", kind)
    part = load_model(ModelRef("", str(base)), torch.float32, kind).model.layers[1].mlp.up_proj
    if kind == "nf4":
        seen = functional.dequantize_4bit(part.weight.data, part.weight.quant_state)
    else:
        seen = functional.int8_vectorwise_dequant(part.weight.CB, part.weight.SCB)
    expected = seen + changes(base, [tmp_path / "a"], UP)[0].float()
    assert torch.allclose(tensors(out)[UP], expected, atol=1e-6)
    assert not torch.allclose(tensors(out)[UP], tensors(base)[UP] + expected - seen, atol=1e-5)
    same = "model.embed_tokens.weight"
    assert torch.equal(tensors(out)[same], tensors(base)[same])
