"""Fuse adapted layers with the same input into one matrix, so that an adapter needs no extra pass over activations.

Let W (out, in) be their stacked frozen weights, A (R, in) and B (out, R) their adapters, B with a block for each layer:

    M = [[W, s B], [A, 0]]        y = [x, x Aᵀ] [W, s B]ᵀ        dx = [dy, s dy B] [W; A]

Forward and backward are one product each, for all of query, key and value, or gate and up. The layers' own weights
become views of M, so nothing is stored twice.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from tongwen.model.kernels.fused_lora import is_plain, parts_of

Part = tuple[torch.Tensor, torch.Tensor, torch.Tensor, float]  # W (out, in), A (r, in), B (out, r), s

# R is rounded up to the hardware's block size: AMX 32 bf16 numbers (a GPU reads 8), AVX-512 16 fp32 numbers.
AT_A_TIME = {torch.bfloat16: 32, torch.float32: 16}


class FusedProjections:
    """parts: the layers', in their order; all W of one dtype and in. inside, outside: in and Σ out."""

    def __init__(self, parts: Sequence[Part]) -> None:
        weights = [weight for weight, *_ in parts]
        self.widths, self.ranks = [len(weight) for weight in weights], [len(a) for _, a, *_ in parts]
        self.out_features, self.in_features = sum(self.widths), weights[0].shape[1]
        step = AT_A_TIME.get(weights[0].dtype, 1)
        rank = -(-sum(self.ranks) // step) * step
        self.matrix = weights[0].new_zeros(self.out_features + rank, self.in_features + rank)
        for weight, rows in zip(weights, self.matrix[: self.out_features].split(self.widths), strict=True):
            rows[:, : self.in_features] = weight.detach()
            weight.data = rows[:, : self.in_features]
        self.forward_weight, self.backward_weight = self.matrix[: self.out_features], self.matrix[:, : self.in_features]
        self.a, self.b = (
            self.matrix[self.out_features :, : self.in_features],
            self.matrix[: self.out_features, self.in_features :],
        )

    def load_adapters(self, parts: Sequence[Part]) -> tuple[tuple[float, ...], list[torch.Tensor]]:
        """Copy the adapters into the fused matrix. Returns all s, and A, B of each layer.

        Call before each forward: not every optimizer that changes the adapters bumps their version counters.
        """
        row = column = 0
        for weight, a, b, scale in parts:
            self.a[column : column + len(a)] = a.detach()
            self.b[row : row + len(weight), column : column + len(a)] = b.detach() * scale
            row, column = row + len(weight), column + len(a)
        return tuple(scale for *_, scale in parts), [one for _, a, b, _ in parts for one in (a, b)]

    def widen(self, x: torch.Tensor) -> torch.Tensor:
        """(T, in) -> [x, x Aᵀ]: (T, in + R)."""
        wide = self.input_buffer(x)
        wide[:, : self.in_features] = x
        return self.fill(wide)

    def input_buffer(self, like: torch.Tensor) -> torch.Tensor:
        """Return an uninitialised (T, in + R) tensor, whose first columns are for x and the rest for `fill`."""
        return like.new_empty(len(like), self.matrix.shape[1])

    def fill(self, wide: torch.Tensor) -> torch.Tensor:
        wide[:, self.in_features :] = wide[:, : self.in_features] @ self.a.t()
        return wide

    def split(self, wide: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[x, x Aᵀ] -> x, x Aᵀ."""
        return wide[:, : self.in_features], wide[:, self.in_features :]

    def output_buffer(self, like: torch.Tensor) -> torch.Tensor:
        """Return an uninitialised (T, out + R) tensor, whose first columns are for dy and the rest for `gradients`."""
        return like.new_empty(len(like), self.matrix.shape[0])

    def gradients(self, x: torch.Tensor, low: torch.Tensor, buffer: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (s dA (R, in), dB' (R, out)); a layer's block of dB' is the transpose of its dB without the scale.

        buffer: its first columns hold dy; its last columns are filled here.
        """
        grad_y = buffer[:, : self.out_features]
        buffer[:, self.out_features :] = grad_y @ self.b
        return buffer[:, self.out_features :].t() @ x, low.t() @ grad_y

    def split_gradients(
        self, grad_a: torch.Tensor, grad_b: torch.Tensor, scales: Sequence[float], adapter_dtype: torch.dtype
    ) -> Iterator[torch.Tensor]:
        """Split the result of `gradients` into dA, dB of each layer, in the adapter's dtype."""
        rows = grad_a.split([*self.ranks, len(grad_a) - sum(self.ranks)])
        blocks = grad_b.split(self.widths, dim=1)
        column = 0
        for rank, row, block, scale in zip(self.ranks, rows, blocks, scales, strict=False):
            yield row.to(adapter_dtype)
            yield block[column : column + rank].t().to(adapter_dtype).mul(scale)
            column += rank


class FusedProjectionsFunction(torch.autograd.Function):
    """x: (..., in), in the dtype of the weights -> the layers' outputs, (..., out_i) each. Saves [x, x Aᵀ] only.
    adapters: A, B of each layer, already loaded into `fused`."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, fused: FusedProjections, scales: tuple[float, ...], *adapters: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        wide = fused.widen(x.reshape(-1, fused.in_features))
        ctx.save_for_backward(wide)
        ctx.fused, ctx.scales, ctx.shape, ctx.adapter_dtype = fused, scales, x.shape, adapters[0].dtype
        out = (wide @ fused.forward_weight.t()).view(*x.shape[:-1], fused.out_features)
        # Not views for autograd, which would forbid to change one in place, as Gemma 3n does.
        return tuple(torch.ops.aten._unsafe_view(part, part.shape) for part in out.split(fused.widths, dim=-1))

    @staticmethod
    def backward(ctx: Any, *grad_out: torch.Tensor) -> tuple[Any, ...]:
        (wide,), fused = ctx.saved_tensors, ctx.fused
        buffer = fused.output_buffer(wide)
        for columns, gradient in zip(buffer[:, : fused.out_features].split(fused.widths, dim=1), grad_out, strict=True):
            columns.copy_(gradient.reshape(columns.shape))
        grad_adapters = fused.split_gradients(
            *fused.gradients(*fused.split(wide), buffer), ctx.scales, ctx.adapter_dtype
        )
        grad_x = (buffer @ fused.backward_weight).view(ctx.shape) if ctx.needs_input_grad[0] else None
        return grad_x, None, None, *grad_adapters


class SiblingProjections:
    """Layers that a module calls in turn on the same input: the first call computes all outputs."""

    def __init__(self, layers: Sequence[Any]) -> None:
        self.layers = layers
        self.fused = FusedProjections([parts_of(layer) for layer in layers])
        self._input: torch.Tensor | None = None
        self._ready: dict[int, torch.Tensor] = {}

    def forward_of(self, number: int) -> Any:
        """Return the fused forward of one layer, to bind to it as a method."""

        def forward(layer: Any, x: torch.Tensor, *arguments: Any, **options: Any) -> Any:
            if self._input is not x or number not in self._ready:
                if not all(is_plain(one, x) for one in self.layers):
                    return type(layer).forward(layer, x, *arguments, **options)
                self._input, self._ready = x, dict(enumerate(self._all(x)))
            found = self._ready.pop(number)
            if not self._ready:
                self._input = None
            return found

        return forward

    def _all(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        scales, adapters = self.fused.load_adapters([parts_of(layer) for layer in self.layers])
        return FusedProjectionsFunction.apply(x, self.fused, scales, *adapters)  # type: ignore[no-any-return]
