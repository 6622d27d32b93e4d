"""NEFTune for packs: uniform noise on the embeddings, alpha / sqrt(L x H) with L the length of the token's own document.

transformers takes L from the row, in a pack the total length of its documents. Its noise would be too small by the square
root of their number.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


class Neftune:
    """Add noise to the input embeddings, inside `scaled_for` only."""

    def __init__(self, model: Any, alpha: float) -> None:
        self.alpha, self.module = alpha, model.get_input_embeddings()

    @contextmanager
    def scaled_for(self, batch: dict[str, Any]) -> Iterator[None]:
        """Inside, the embeddings of this micro-batch get noise."""
        lengths = lengths_of(batch)

        def add(module: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
            size = self.alpha / (lengths.to(output) * output.shape[-1]).sqrt()  # (B, T)
            return output + torch.empty_like(output).uniform_(-1, 1) * size[..., None]

        handle = self.module.register_forward_hook(add)
        try:
            yield
        finally:
            handle.remove()


def lengths_of(batch: dict[str, Any]) -> torch.Tensor:
    """Return for each token the length of its document: (1, T) of a pack, (B, 1) of a padded batch."""
    if "attention_mask" in batch:
        return torch.as_tensor(batch["attention_mask"].sum(dim=1, keepdim=True))
    sizes = batch["cu_seq_lens_q"].diff().long()
    return sizes.repeat_interleave(sizes)[None]
