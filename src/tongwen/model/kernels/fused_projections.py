"""Adapted layers that read the same input as one matrix: an adapter costs no pass over activations.

With W (out, in) their frozen weights below each other, A (R, in) and B (out, R) their adapters, B a block for each layer,

    M = [[W, s B], [A, 0]]        y = [x, x Aᵀ] [W, s B]ᵀ        dx = [dy, s dy B] [W; A]

so that each direction is one product, and query, key and value, or gate and up, are one as well. The layers' own weights
become views of M: nothing is held twice.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from tongwen.model.kernels.fused_lora import is_plain, parts_of

Part = tuple[torch.Tensor, torch.Tensor, torch.Tensor, float]  # W (out, in), A (r, in), B (out, r), s

# R is rounded up to what the products take at a time: AMX 32 bf16 numbers (a GPU reads 8 of them), AVX-512 16 of fp32.
AT_A_TIME = {torch.bfloat16: 32, torch.float32: 16}


class FusedProjections:
    """parts: the layers', in their order; all W of one number type and in. inside, outside: in and Σ out."""

    def __init__(self, parts: Sequence[Part]) -> None:
        weights = [weight for weight, *_ in parts]
        self.widths, self.ranks = [len(weight) for weight in weights], [len(a) for _, a, *_ in parts]
        self.outside, self.inside = sum(self.widths), weights[0].shape[1]
        step = AT_A_TIME.get(weights[0].dtype, 1)
        rank = -(-sum(self.ranks) // step) * step
        self.matrix = weights[0].new_zeros(self.outside + rank, self.inside + rank)
        for weight, rows in zip(weights, self.matrix[: self.outside].split(self.widths), strict=True):
            rows[:, : self.inside] = weight.detach()
            weight.data = rows[:, : self.inside]
        self.forth, self.back = self.matrix[: self.outside], self.matrix[:, : self.inside]
        self.a, self.b = self.matrix[self.outside :, : self.inside], self.matrix[: self.outside, self.inside :]

    def take(self, parts: Sequence[Part]) -> tuple[tuple[float, ...], list[torch.Tensor]]:
        """The adapters as they are now: before each forward, for not every optimizer that moves them leaves a sign of it.
        Returns all s, and A, B of each layer."""
        row = column = 0
        for weight, a, b, scale in parts:
            self.a[column : column + len(a)] = a.detach()
            self.b[row : row + len(weight), column : column + len(a)] = b.detach() * scale
            row, column = row + len(weight), column + len(a)
        return tuple(scale for *_, scale in parts), [one for _, a, b, _ in parts for one in (a, b)]

    def widen(self, x: torch.Tensor) -> torch.Tensor:
        """(T, in) -> [x, x Aᵀ]: (T, in + R)."""
        wide = self.entry(x)
        wide[:, : self.inside] = x
        return self.fill(wide)

    def entry(self, like: torch.Tensor) -> torch.Tensor:
        """Where x belongs into the first columns, for `fill`: (T, in + R)."""
        return like.new_empty(len(like), self.matrix.shape[1])

    def fill(self, wide: torch.Tensor) -> torch.Tensor:
        wide[:, self.inside :] = wide[:, : self.inside] @ self.a.t()
        return wide

    def split(self, wide: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[x, x Aᵀ] -> x, x Aᵀ."""
        return wide[:, : self.inside], wide[:, self.inside :]

    def exit(self, like: torch.Tensor) -> torch.Tensor:
        """Where dy belongs into the first columns, for `gradients`: (T, out + R)."""
        return like.new_empty(len(like), self.matrix.shape[0])

    def gradients(self, x: torch.Tensor, low: torch.Tensor, room: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """For a room whose first columns hold dy, whose last are filled here: (s dA (R, in), dB' (R, out)), where the block of
        a layer is the transpose of its dB without the scale."""
        of_y = room[:, : self.outside]
        room[:, self.outside :] = of_y @ self.b
        return room[:, self.outside :].t() @ x, low.t() @ of_y

    def deal(
        self, of_a: torch.Tensor, of_b: torch.Tensor, scales: Sequence[float], own: torch.dtype
    ) -> Iterator[torch.Tensor]:
        """What `gradients` gave, as (dA, dB) of each layer in its adapter's number type."""
        rows = of_a.split([*self.ranks, len(of_a) - sum(self.ranks)])
        blocks = of_b.split(self.widths, dim=1)
        column = 0
        for rank, row, block, scale in zip(self.ranks, rows, blocks, scales, strict=False):
            yield row.to(own)
            yield block[column : column + rank].t().to(own).mul(scale)
            column += rank


class FusedProjectionsFunction(torch.autograd.Function):
    """x: (..., in), in the number type of the weights -> the layers' outputs, (..., out_i) each. adapters: A, B of each layer,
    which `joined` has taken. Saves [x, x Aᵀ] only."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, joined: FusedProjections, scales: tuple[float, ...], *adapters: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        wide = joined.widen(x.reshape(-1, joined.inside))
        ctx.save_for_backward(wide)
        ctx.joined, ctx.scales, ctx.shape, ctx.own = joined, scales, x.shape, adapters[0].dtype
        out = (wide @ joined.forth.t()).view(*x.shape[:-1], joined.outside)
        return tuple(out.split(joined.widths, dim=-1))

    @staticmethod
    def backward(ctx: Any, *of_out: torch.Tensor) -> tuple[Any, ...]:
        (wide,), joined = ctx.saved_tensors, ctx.joined
        room = joined.exit(wide)
        for columns, gradient in zip(room[:, : joined.outside].split(joined.widths, dim=1), of_out, strict=True):
            columns.copy_(gradient.reshape(columns.shape))
        of_adapters = joined.deal(*joined.gradients(*joined.split(wide), room), ctx.scales, ctx.own)
        of_x = (room @ joined.back).view(ctx.shape) if ctx.needs_input_grad[0] else None
        return of_x, None, None, *of_adapters


class SiblingProjections:
    """Layers that a module calls one after another on the same input: the first call computes for all."""

    def __init__(self, layers: Sequence[Any]) -> None:
        self.layers = layers
        self.joined = FusedProjections([parts_of(layer) for layer in layers])
        self._input: torch.Tensor | None = None
        self._ready: dict[int, torch.Tensor] = {}

    def forward_of(self, number: int) -> Any:
        """The fast forward of the layer of that number, to be a method of it."""

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
        scales, adapters = self.joined.take([parts_of(layer) for layer in self.layers])
        return FusedProjectionsFunction.apply(x, self.joined, scales, *adapters)  # type: ignore[no-any-return]
