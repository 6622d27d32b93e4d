"""Original LLaMA folders of small models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

# the published shapes, scaled down: heads, grouped heads, files, rows of the vocabulary, norm_eps, extra params
SIZES: dict[str, tuple[int, int, int, int, float, dict[str, Any]]] = {
    "7B": (4, 4, 1, 32, 1e-6, {}),
    "13B, 49953 rows": (4, 4, 2, 53, 1e-6, {}),
    "33B": (8, 8, 4, 64, 1e-6, {}),
    "65B": (8, 8, 8, 64, 1e-5, {}),
    "LLaMA-2 70B": (16, 8, 8, 64, 1e-5, {"n_kv_heads": 8}),
    "LLaMA-3 8B": (8, 2, 1, 96, 1e-5, {"n_kv_heads": 2, "rope_theta": 500000.0}),
    "LLaMA-3.1 70B": (8, 4, 4, 96, 1e-5, {"n_kv_heads": 4, "rope_theta": 500000.0, "use_scaled_rope": True}),
}
WIDTH, LAYERS, WIDE = 64, 2, 192


def make_original(folder: Path, size: str, dtype: torch.dtype = torch.float16) -> None:
    """Random files of LLaMA's own format, written by torch.save as Meta did."""
    heads, groups, files, vocabulary, epsilon, more = SIZES[size]
    torch.manual_seed(0)
    narrow = WIDTH // heads * groups
    whole: dict[str, tuple[tuple[int, ...], int | None]] = {
        "tok_embeddings.weight": ((vocabulary, WIDTH), 0 if "rope_theta" in more else 1),
        "norm.weight": ((WIDTH,), None),
        "output.weight": ((vocabulary, WIDTH), 0),
    }
    for layer in range(LAYERS):
        at = f"layers.{layer}"
        whole |= {
            f"{at}.attention.wq.weight": ((WIDTH, WIDTH), 0),
            f"{at}.attention.wk.weight": ((narrow, WIDTH), 0),
            f"{at}.attention.wv.weight": ((narrow, WIDTH), 0),
            f"{at}.attention.wo.weight": ((WIDTH, WIDTH), 1),
            f"{at}.feed_forward.w1.weight": ((WIDE, WIDTH), 0),
            f"{at}.feed_forward.w2.weight": ((WIDTH, WIDE), 1),
            f"{at}.feed_forward.w3.weight": ((WIDE, WIDTH), 0),
            f"{at}.attention_norm.weight": ((WIDTH,), None),
            f"{at}.ffn_norm.weight": ((WIDTH,), None),
        }
    parts: list[dict[str, torch.Tensor]] = [{} for _ in range(files)]
    for name, (shape, axis) in whole.items():
        tensor = torch.randn(shape, dtype=torch.float32).to(dtype)
        if axis is None:
            pieces = [tensor] * files
        else:
            size_ = shape[axis] // files
            sizes = [size_] * (files - 1) + [shape[axis] - size_ * (files - 1)]
            pieces = list(tensor.split(sizes, dim=axis))
        for part, piece in zip(parts, pieces, strict=True):
            part[name] = piece.clone()
    folder.mkdir(parents=True)
    for number, part in enumerate(parts):
        part["rope.freqs"] = torch.zeros(4)
        torch.save(part, folder / f"consolidated.{number:02d}.pth")
    params = {"dim": WIDTH, "multiple_of": 64, "n_heads": heads, "n_layers": LAYERS, "norm_eps": epsilon}
    (folder / "params.json").write_text(json.dumps({**params, "vocab_size": -1, **more}))
