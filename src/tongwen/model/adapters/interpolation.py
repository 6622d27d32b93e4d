"""Weight interpolation between the model before training and after it (WiSE-FT, arXiv 2109.01903).

Every trained tensor goes back a part of its way: base + share x (trained - base). Of a fresh LoRA pair only B moves, which
is zero before training, so that the change of the weights is scaled exactly.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.distributed.tensor import DTensor, distribute_tensor

from tongwen.model.adapters.attach import AdaptedModel


class Interpolation:
    """The trained tensors of a model, and their values before training. Make it before the first step.

    rows: ids of rows that the base never trained, such as new pieces; they stay as trained, since there is nothing to go
    back to.
    """

    def __init__(self, adapted: AdaptedModel, rows: Sequence[int]) -> None:
        self.share = 1.0
        self.parts = [(part, _local(part).to("cpu", copy=True)) for part in _moved(adapted)]
        matrices = {id(part) for part in adapted.embeddings}
        self.kept_rows = {
            id(part): _local_rows(part, rows) for part, _unused in self.parts if rows and id(part) in matrices
        }

    def set_share(self, share: float) -> None:
        """Move all tensors to this share of their way. 0 is the model before training, to the bit; no other share can be
        reached from there."""
        if share == self.share:
            return
        for part, before in self.parts:
            local = _local(part)  # detached: what is done in place is not recorded
            rows = self.kept_rows.get(id(part))
            learned = local[rows].clone() if rows is not None else None
            start = before.to(local.device)
            if share:
                local.sub_(start).mul_(share / self.share).add_(start)
            else:
                local.copy_(start)
            if learned is not None:
                local[rows] = learned
        self.share = share


def _moved(adapted: AdaptedModel) -> list[torch.nn.Parameter]:
    """Return the trained tensors that go back: not the rows that peft trains one by one, and of a fresh LoRA pair only B."""
    names = {id(part): name for name, part in adapted.model.named_parameters()}
    fresh = {
        name.replace(".lora_B.", ".lora_A.")
        for name, part in adapted.model.named_parameters()
        if ".lora_B." in name and not _local(part).any()
    }
    return [
        part for part in adapted.trainable if "trainable_tokens_" not in (name := names[id(part)]) and name not in fresh
    ]


def _local(part: torch.Tensor) -> torch.Tensor:
    return part.to_local().detach() if isinstance(part, DTensor) else part.detach()


def _local_rows(part: torch.Tensor, rows: Sequence[int]) -> torch.Tensor:
    """Return which rows of a matrix (V, H), or of this process's shard of it, are among these ids, as a mask (V,)."""
    mask = torch.zeros(len(part), 1, dtype=torch.bool, device=part.device)
    mask[list(rows)] = True
    if isinstance(part, DTensor):
        mask = distribute_tensor(mask, part.device_mesh, part.placements).to_local()
    return mask[:, 0]
