"""Loss on learned tokens only, and bits per byte, which compares models across vocabularies.

The model's head runs only on the rows that predict a learned token (`logits_to_keep`). The gradient of the
cross-entropy overwrites the logits, so the loss needs memory for one copy of them. If the head is frozen, the loss
computes blocks of rows and needs memory for one block only.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel

from tongwen.model.kernels.recurrent import carries_state

ROWS_AT_ONCE = {"cpu": 4}  # rows per softmax: on a CPU their logits stay in the cache of a core
ROWS_ELSEWHERE = 256  # small blocks would make an accelerator wait for kernel launches
HEAD_ROWS = {"cpu": 256}  # rows of logits in memory with the blockwise head
HEAD_ROWS_ELSEWHERE = 1024


def head_rows(device: str) -> int:
    """Return how many rows of logits are in memory with the blockwise head."""
    return HEAD_ROWS.get(device, HEAD_ROWS_ELSEWHERE)


def _overwrite(logits: torch.Tensor, targets: torch.Tensor, scale: float | torch.Tensor) -> torch.Tensor:
    """Return each row's nats, (R,) in fp32, and overwrite the logits (R, V) with the gradient of scale x their sum.

    The scale is part of the softmax's division, which saves another pass over the logits.
    """
    nats = torch.empty(len(targets), dtype=torch.float32, device=logits.device)
    at_once = ROWS_AT_ONCE.get(logits.device.type, ROWS_ELSEWHERE)
    for begin in range(0, len(targets), at_once):
        block = logits[begin : begin + at_once]
        wanted = targets[begin : begin + at_once, None]
        scores = block if block.dtype == torch.float32 else block.float()
        highest = scores.amax(dim=1, keepdim=True)
        scores.sub_(highest)
        target_score = scores.gather(1, wanted)
        scores.exp_()
        total = scores.sum(dim=1, keepdim=True)
        nats[begin : begin + at_once] = (total.log() - target_score).squeeze(1)
        scores.mul_(scale / total)
        scores.scatter_add_(1, wanted, torch.zeros_like(target_score).sub_(scale))
        if scores is not block:
            block.copy_(scores)
    return nats


class LearnedCrossEntropy(torch.autograd.Function):
    """scale x sum of -log p(target) over rows; the gradient overwrites the logits.

    logits:  (R, V), consumed
    targets: (R,) ids
    Returns (scaled sum (), nats per row (R,)), in fp32.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: torch.Tensor, targets: torch.Tensor, scale: float | torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        nats = _overwrite(logits, targets, scale)
        ctx.gradient = logits
        ctx.mark_non_differentiable(nats)
        return nats.sum() * scale, nats

    @staticmethod
    def backward(ctx: Any, grad_sum: torch.Tensor, grad_nats: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        gradient = ctx.gradient
        ctx.gradient = None
        # Only on a CPU: the comparison would wait for an accelerator, and fake tensors have no value to compare.
        if type(grad_sum) is torch.Tensor and grad_sum.device.type == "cpu" and grad_sum == 1:
            return gradient, None, None
        return gradient.mul_(grad_sum.to(gradient.dtype)), None, None


class HeadLoss(torch.autograd.Function):
    """The same through a frozen head, a block of rows at a time: the logits of all rows never exist together.

    hidden:  (R, H), the head's input
    weight:  (V, H)
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, scale: float | torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        weight, size = weight.to(hidden.dtype), head_rows(hidden.device.type)
        grad_hidden, nats = torch.empty_like(hidden), []
        for rows, wanted, gradients in zip(
            hidden.split(size), targets.split(size), grad_hidden.split(size), strict=True
        ):
            logits = rows @ weight.t()
            nats.append(_overwrite(logits, wanted, scale))
            if ctx.needs_input_grad[0]:
                gradients.copy_(logits @ weight)
        ctx.save_for_backward(grad_hidden)
        each = torch.cat(nats)
        ctx.mark_non_differentiable(each)
        return each.sum() * scale, each

    @staticmethod
    def backward(ctx: Any, grad_sum: torch.Tensor, grad_nats: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        (grad_hidden,) = ctx.saved_tensors
        return grad_hidden * grad_sum.to(grad_hidden.dtype), None, None, None


def use_blockwise_head(model: Any, batch: dict[str, Any] | None) -> bool:
    """Let `learned_loss` compute the head in blocks, if the model allows it; returns whether it does.

    The head must be frozen, and the model must not change the head's output (Gemma 2 and Granite do). batch: used to
    test the latter; None: skip the test.
    """
    head = model.get_output_embeddings()
    if type(head) is not torch.nn.Linear or head.bias is not None or "forward" in vars(head):  # or hooked by others
        return False
    head.is_blockwise = not head.weight.requires_grad and (batch is None or _logits_are_head_output(model, head, batch))
    return bool(head.is_blockwise)


def _logits_are_head_output(model: Any, head: torch.nn.Linear, batch: dict[str, Any]) -> bool:
    outputs: list[torch.Tensor] = []
    hook = head.register_forward_hook(lambda module, arguments, output: outputs.append(output))
    try:
        with torch.no_grad():
            logits = model(**_inputs(batch, model), use_cache=False).logits
    finally:
        hook.remove()
    return len(outputs) == 1 and torch.equal(outputs[0], logits)


@contextmanager
def _blockwise_head(model: Any) -> Iterator[torch.nn.Linear | None]:
    """Yield the head if it runs blockwise, else None. In the block the head returns its input instead of logits."""
    head = (model.module if isinstance(model, DistributedDataParallel) else model).get_output_embeddings()
    if not getattr(head, "is_blockwise", False):
        yield None
        return
    head.forward = lambda hidden: hidden
    try:
        yield head
    finally:
        del head.forward


def _inputs(batch: dict[str, Any], model: Any) -> dict[str, Any]:
    inputs = {key: value for key, value in batch.items() if key in INPUTS}
    if "seq_idx" in inputs and not carries_state(model):  # attention needs the borders alone
        del inputs["seq_idx"]
    return inputs if "attention_mask" in batch else {**inputs, "logits_to_keep": batch["rows"]}


def learned_logits(model: Any, batch: dict[str, Any]) -> torch.Tensor:
    """Return the logits (R, V) that predict the learned tokens of a micro-batch."""
    rows: torch.Tensor = model(**_inputs(batch, model), use_cache=False).logits.flatten(0, 1)
    return rows[batch["rows"]] if "attention_mask" in batch else rows  # padded: rows count through the (B, L) batch


def learned_loss(
    model: Any, batch: dict[str, Any], scale: float | torch.Tensor = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (scale x sum of nats () with gradient, nats per learned token (R,)) of a micro-batch from `train.packing`.

    An empty micro-batch (its single token is masked) gives a zero that still depends on every parameter.
    """
    with _blockwise_head(model) as head:
        rows = learned_logits(model, batch)
    if not batch["learned"]:
        return rows.sum() * 0.0, rows.new_zeros(0, dtype=torch.float32)
    if head is not None:
        return HeadLoss.apply(rows, head.weight, batch["targets"], scale)  # type: ignore[no-any-return]
    if rows.dtype == torch.float16:  # much of a scaled gradient would underflow
        total, nats = LearnedCrossEntropy.apply(rows.contiguous(), batch["targets"], 1.0)
        return total * scale, nats
    return LearnedCrossEntropy.apply(rows.contiguous(), batch["targets"], scale)  # type: ignore[no-any-return]


INPUTS = (
    "input_ids",
    "attention_mask",
    "position_ids",
    "cu_seq_lens_q",
    "cu_seq_lens_k",
    "max_length_q",
    "max_length_k",
    "seq_idx",
)


def bits_per_byte(model: Any, batches: Iterable[dict[str, Any]], token_bytes: torch.Tensor) -> dict[str, float]:
    """Return bits per byte: loss in nats over learned tokens / (ln 2 x UTF-8 bytes of those tokens).

    token_bytes: (V,) bytes of each token; special tokens have 0 and count in neither sum.
    The result also has the loss per token (special tokens included) and the counts.
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
