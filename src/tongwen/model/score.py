"""Loss on learned tokens only, and the number that crosses every wall: bits per byte.

The model's head runs on just the rows that predict a learned token (`logits_to_keep`), and the gradient of the
cross-entropy is computed where the logits lie, so that one copy of them is all the memory that the loss needs.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch

ROWS_AT_ONCE = {"cpu": 4}  # rows whose softmax is computed together: on a CPU their logits stay in the cache of a core
ROWS_ELSEWHERE = 256  # an accelerator would wait for the launches of small blocks


class LearnedCrossEntropy(torch.autograd.Function):
    """scale x sum of -log p(target) over rows; the gradient overwrites the logits.

    logits:  (R, V), consumed
    targets: (R,) ids
    Returns (scaled sum (), nats per row (R,)), in fp32. The scale is part of the softmax's division: afterwards, it would be
    another pass over the logits.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: torch.Tensor, targets: torch.Tensor, scale: float | torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        nats = torch.empty(len(targets), dtype=torch.float32, device=logits.device)
        at_once = ROWS_AT_ONCE.get(logits.device.type, ROWS_ELSEWHERE)
        for begin in range(0, len(targets), at_once):
            block = logits[begin : begin + at_once]
            wanted = targets[begin : begin + at_once, None]
            scores = block if block.dtype == torch.float32 else block.float()
            highest = scores.amax(dim=1, keepdim=True)
            scores.sub_(highest)
            of_target = scores.gather(1, wanted)
            scores.exp_()
            total = scores.sum(dim=1, keepdim=True)
            nats[begin : begin + at_once] = (total.log() - of_target).squeeze(1)
            scores.mul_(scale / total)
            scores.scatter_add_(1, wanted, torch.zeros_like(of_target).sub_(scale))
            if scores is not block:
                block.copy_(scores)
        ctx.gradient = logits
        ctx.mark_non_differentiable(nats)
        return nats.sum() * scale, nats

    @staticmethod
    def backward(ctx: Any, of_sum: torch.Tensor, of_nats: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        gradient = ctx.gradient
        ctx.gradient = None
        if of_sum.device.type == "cpu" and of_sum == 1:  # elsewhere the question would wait for the device
            return gradient, None, None
        return gradient.mul_(of_sum.to(gradient.dtype)), None, None


def learned_loss(
    model: Any, batch: dict[str, Any], scale: float | torch.Tensor = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """(scale x sum of nats () with gradient, nats per learned token (R,)) of one micro-batch as `train.batches` makes it.

    An empty micro-batch (its one token is masked) gives a zero that still touches every parameter.
    """
    inputs = {key: value for key, value in batch.items() if key in INPUTS}
    rows, targets = batch["rows"], batch["targets"]
    if "attention_mask" in batch:  # padded: (B, L), rows count through the flattened batch
        logits = model(**inputs, use_cache=False).logits.flatten(0, 1)[rows]
    else:
        logits = model(**inputs, logits_to_keep=rows, use_cache=False).logits.flatten(0, 1)
    if not batch["learned"]:
        return logits.sum() * 0.0, logits.new_zeros(0, dtype=torch.float32)
    # A view would share the memory with a tensor that autograd still needs.
    return LearnedCrossEntropy.apply(logits.contiguous(), targets, scale)  # type: ignore[no-any-return]


INPUTS = (
    "input_ids",
    "attention_mask",
    "position_ids",
    "cu_seq_lens_q",
    "cu_seq_lens_k",
    "max_length_q",
    "max_length_k",
)


def bits_per_byte(model: Any, batches: Iterable[dict[str, Any]], token_bytes: torch.Tensor) -> dict[str, float]:
    """Sum of loss in nats over learned tokens / (ln 2 x UTF-8 bytes that those tokens stand for).

    token_bytes: (V,) bytes of each token; special tokens have 0 and are counted in neither sum.
    Also gives the loss per token (special tokens included) and the counts.
    """
    nats = nats_text = 0.0
    size = tokens = 0
    was_training = model.training
    model.eval()
    with torch.no_grad():
        for batch in batches:
            if not batch["learned"]:
                continue
            _, each = learned_loss(model, batch)
            sizes = token_bytes[batch["targets"].cpu()]
            each = each.double().cpu()
            nats += float(each.sum())
            nats_text += float(each[sizes > 0].sum())
            size += int(sizes.sum())
            tokens += len(each)
    model.train(was_training)
    return {
        "bits_per_byte": nats_text / (math.log(2) * max(size, 1)),
        "loss": nats / max(tokens, 1),
        "bytes": size,
        "tokens": tokens,
    }
