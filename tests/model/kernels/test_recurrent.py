"""Layers with a state share a row of documents where their kernels heed the borders, and only there."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.conftest import byte_level_tokenizer, dialogues, write_recipe
from tests.export.gguf_models import make_model
from tongwen.core.errors import NumbersError
from tongwen.model.kernels import packed_attention, recurrent
from tongwen.model.kernels.loss import learned_loss
from tongwen.train import audit

SAMPLES = [(np.arange(begin, end, dtype=np.uint32), np.arange(end - begin) > 0) for begin, end in ((3, 20), (40, 60))]
KNOWN = ("activation", "g", "beta", "use_qk_l2norm_in_kernel", "output_final_state", "initial_state")


def kernel(reference: Callable[..., Any], heeds: str, *tensors: torch.Tensor, **more: Any) -> Any:
    """What a package's kernel computes: each document of its own. heeds: the argument that it reads, if any."""
    borders, seq_idx = more.get("cu_seqlens"), more.get("seq_idx")
    more = {name: value for name, value in more.items() if name in KNOWN}
    if heeds == "seq_idx" and seq_idx is not None:  # a convolution over (1, channels, T), with weight and bias
        lengths = torch.unique_consecutive(seq_idx[0], return_counts=True)[1].tolist()
        parts = [reference(part, *tensors[1:], **more) for part in tensors[0].split(lengths, dim=-1)]
        return torch.cat(parts, dim=-1)
    if heeds == "cu_seqlens" and borders is not None:  # the delta rule over (1, T, heads, width)
        lengths = borders.diff().tolist()
        each = zip(*(part.split(lengths, dim=1) for part in (*tensors, more.pop("g"), more.pop("beta"))), strict=True)
        parts = [reference(*own, g=g, beta=beta, **more)[0] for *own, g, beta in each]
        return torch.cat(parts, dim=1), None
    return reference(*tensors, **more)


def with_kernels(monkeypatch: pytest.MonkeyPatch, convolution: str = "seq_idx", rule: str = "cu_seqlens") -> None:
    """Simulate installed packages, whose kernels read these arguments."""
    from transformers.models.qwen3_5 import modeling_qwen3_5 as code

    for name, heeds in (("causal_conv1d_fn", convolution), ("torch_chunk_gated_delta_rule", rule)):
        monkeypatch.setattr(code, name, partial(kernel, getattr(code, name).__wrapped__, heeds))
    monkeypatch.setattr(recurrent, "find_spec", lambda name: object())


def packing_model(folder: Path) -> Any:
    model = make_model(folder, "qwen3_5_text", 100)
    packed_attention.use(model)
    return model


def test_packages_are_those_that_the_code_names(tmp_path: Path) -> None:
    model = make_model(tmp_path, "qwen3_5_text", 100)
    assert recurrent.carries_state(model)
    assert recurrent.missing_packages(model) == ["causal-conv1d", "flash-linear-attention"]
    plain = make_model(tmp_path, "qwen3", 100)
    assert not recurrent.carries_state(plain) and recurrent.missing_packages(plain) == []


def test_kernels_with_boundaries_isolate_documents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_kernels(monkeypatch)
    model = packing_model(tmp_path)
    assert audit.check_isolation(model, SAMPLES, learned_loss) < 1e-4
    assert audit.check_no_state_passes(model, SAMPLES, learned_loss) < 1e-5


@pytest.mark.parametrize("dropped", [{"convolution": ""}, {"rule": ""}])
def test_kernel_that_ignores_boundaries_is_detected(
    dropped: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_kernels(monkeypatch, **dropped)
    model = packing_model(tmp_path)
    with pytest.raises(NumbersError, match="can see each other"):
        audit.check_no_state_passes(model, SAMPLES, learned_loss)


def test_reference_without_packages_refuses_a_pack(tmp_path: Path) -> None:
    model = packing_model(tmp_path)
    with pytest.raises(ValueError, match="can't keep packed sequences apart"):
        audit.check_isolation(model, SAMPLES, learned_loss)


@pytest.mark.parametrize(
    ("kernels", "said"),
    [
        (None, "are missing: causal-conv1d flash-linear-attention"),
        ({}, "documents in a pack cannot see each other"),
        ({"convolution": ""}, "trains in padded batches: documents in one pack can see each other"),
    ],
)
def test_run_packs_only_with_supporting_kernels(
    kernels: dict[str, str] | None, said: str, tmp_path: Path, tongwen: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kernels is not None:
        with_kernels(monkeypatch, **kernels)
    folder = tmp_path / "model"
    make_model(folder, "qwen3_5_text", len(byte_level_tokenizer(folder)))
    recipe = write_recipe(tmp_path, folder, dialogues(24), sft=", stop_after: 1 steps", merge=False)
    if kernels is None:
        code, text, err = tongwen("plan", recipe)
        assert code == 0 and "pip install causal-conv1d flash-linear-attention" in " ".join(text.split()), err
    code, text, err = tongwen("run", recipe)
    assert code == 0 and said in " ".join(text.split()), text + err
