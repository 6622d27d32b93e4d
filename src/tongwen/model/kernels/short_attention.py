"""Causal attention of one document in bf16 on a CPU, with a faster backward than torch's own (13 ms instead of 35 for
two documents of 512 tokens, 9 heads of 64, with AMX)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

BLOCK = 256  # queries per block of scores


class ShortAttention(torch.autograd.Function):
    """query: (1, heads, T, head_dim); key, value: (1, kv_heads, T, head_dim). Computes one block of queries at a time,
    scores and softmax in fp32, products in bf16. Saves the softmax's output: 2 bytes for each pair of tokens and head.
    """

    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> torch.Tensor:
        grouped, keys, values = query[0].unflatten(0, (len(key[0]), -1)), key[0], value[0]
        wide = keys.float().transpose(1, 2)
        out = torch.empty_like(grouped)
        later = torch.full((BLOCK, BLOCK), -math.inf).triu(1)
        weights = []
        for begin, end in _blocks(grouped.shape[2]):
            rows = grouped[:, :, begin:end]  # (kv_heads, heads of each, block, head_dim)
            scores = wide.new_empty(len(keys), rows.shape[1] * rows.shape[2], end)
            with torch.autocast("cpu", enabled=False), _products_of_bf16():
                scores.baddbmm_(rows.float().flatten(1, 2), wide[:, :, :end], beta=0, alpha=scale)
            scores.unflatten(1, rows.shape[1:3])[..., begin:].add_(later[: end - begin, : end - begin])
            weights.append(scores.softmax(-1).to(query.dtype))
            out[:, :, begin:end] = torch.bmm(weights[-1], values[:, :end]).view_as(rows)
        ctx.save_for_backward(query, key, value, *weights)
        ctx.scale = scale
        return out.view_as(query)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[Any, ...]:
        query, key, value, *weights = ctx.saved_tensors
        grouped, keys, values = query[0].unflatten(0, (len(key[0]), -1)), key[0], value[0]
        grad_out = gradient[0].unflatten(0, grouped.shape[:2])
        grad_query, grad_key, grad_value = torch.empty_like(grouped), torch.zeros_like(keys), torch.zeros_like(values)
        for (begin, end), weight in zip(_blocks(grouped.shape[2]), weights, strict=True):
            rows, grad_rows = (part[:, :, begin:end].flatten(1, 2) for part in (grouped, grad_out))
            grad_weight = torch.bmm(grad_rows, values[:, :end].transpose(1, 2))
            grad_scores = torch._softmax_backward_data(grad_weight, weight, -1, weight.dtype)
            grad_query[:, :, begin:end] = torch.bmm(grad_scores, keys[:, :end]).view_as(grad_query[:, :, begin:end])
            grad_key[:, :end].baddbmm_(grad_scores.transpose(1, 2), rows)
            grad_value[:, :end].baddbmm_(weight.transpose(1, 2), grad_rows)
        return grad_query.mul_(ctx.scale).view_as(query), grad_key.mul_(ctx.scale)[None], grad_value[None], None


@contextmanager
def _products_of_bf16() -> Iterator[None]:
    """Multiply fp32 matrices as bf16 in this block, summing in fp32: exact for bf16 values, and twice as fast."""
    precision = torch.backends.mkldnn.matmul
    before = precision.fp32_precision
    precision.fp32_precision = "bf16"
    try:
        yield
    finally:
        precision.fp32_precision = before


def _blocks(length: int) -> list[tuple[int, int]]:
    return [(begin, min(begin + BLOCK, length)) for begin in range(0, length, BLOCK)]
