"""Random samples, packed batches and their gradients."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from tongwen.data.token_store import SAMPLE, TokenStore, spans_of
from tongwen.model.kernels import packed_attention
from tongwen.model.kernels.loss import learned_loss
from tongwen.model.loading.load import load_model
from tongwen.model.loading.model_ref import ModelRef
from tongwen.train.packing import pack


def random_store(count: int, seed: int = 0, longest: int = 40, vocabulary: int = 300) -> TokenStore:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(3, longest, count)
    ids = rng.integers(0, vocabulary, lengths.sum()).astype(np.uint32)
    learn = rng.random(lengths.sum()) < 0.6
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    learn[offsets[:-1]] = False
    learn[offsets[1:] - 1] = True
    samples = np.zeros(count, SAMPLE)
    samples["row"], samples["stop"] = np.arange(count), True
    return TokenStore(ids, offsets, spans_of(learn), samples, ("f",))


def packed_model(folder: Path) -> Any:
    model = load_model(ModelRef("t", str(folder)), torch.float32)
    model.set_attn_implementation(packed_attention.register())
    return model


def batch_of(count: int) -> dict[str, Any]:
    store = random_store(count)
    return pack([store.sample(index) for index in range(count)])


def gradient(model: Any, batch: dict[str, Any]) -> tuple[float, torch.Tensor]:
    """Return (loss, whole gradient) of a step's only micro-batch."""
    model.zero_grad()
    total, _ = learned_loss(model, batch)
    total.backward()
    return float(total.detach()), torch.cat([part.grad.flatten() for part in model.parameters() if part.requires_grad])
