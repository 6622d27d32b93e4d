"""RMSNorm, the gated MLP and adapted layers as one fused operation each.

This helps where memory traffic costs more than arithmetic: on a CPU, and on a GPU in 16 bits. In eager mode each small
step reads and writes a whole activation; the fused forms work in place where they can and save what the backward needs.
A module is replaced only if a test on random rows gives the same result. Others (Gemma's 1 + weight, other activations,
layers that peft must handle itself) stay unchanged.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from inspect import signature
from types import MethodType
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.functional import rms_norm, silu

from tongwen.model.kernels.fused_lora import is_plain, parts_of
from tongwen.model.kernels.fused_projections import FusedProjections, SiblingProjections

MLP, QKV = ("gate_proj", "up_proj", "down_proj"), ("q_proj", "k_proj", "v_proj")

FUSED_DTYPES = {"cpu": (torch.float32, torch.bfloat16), "cuda": (torch.bfloat16,)}
ROWS = 128  # per block: their fp32 copies fit in a core's cache


class FusedRmsNorm(torch.autograd.Function):
    """x: (..., width); weight: (width,), frozen. Saves x and one number per row, in fp32 or wider."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
        flat = x.reshape(-1, x.shape[-1])
        wide = torch.promote_types(x.dtype, torch.float32)
        inverse, out = flat.new_empty(len(flat), 1, dtype=wide), torch.empty_like(flat)
        for rows, scales, results in _blocks(flat, inverse, out):
            rows = rows.to(wide)
            torch.linalg.vector_norm(rows, dim=-1, keepdim=True, out=scales)
            scales.square_().div_(x.shape[-1]).add_(epsilon).rsqrt_()
            results.copy_(rows * scales).mul_(weight)
        ctx.save_for_backward(x, weight, inverse)
        return out.view(x.shape)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[Any, ...]:
        x, weight, inverse = ctx.saved_tensors
        out = torch.empty_like(gradient, memory_format=torch.contiguous_format)
        flat = (part.reshape(-1, x.shape[-1]) for part in (gradient, x))
        for upper, rows, scales, results in _blocks(*flat, inverse, out.view(-1, x.shape[-1])):
            rows, grad_rows = rows.to(inverse.dtype), (upper * weight).to(inverse.dtype)
            along = torch.linalg.vecdot(grad_rows, rows).unsqueeze(-1).mul_(scales.pow(3)).div_(-x.shape[-1])
            results.copy_(grad_rows.mul_(scales).addcmul_(rows, along))
        return out, None, None


def _blocks(*parts: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    """The same rows of all parts; of tensors without values the first block alone, which is like the others."""
    if isinstance(parts[0], FakeTensor):  # to cut off hundreds that nobody reads took most of an estimate's time
        return iter([tuple(part[:ROWS] for part in parts)])
    return zip(*(part.split(ROWS) for part in parts), strict=True)


class FusedGatedMlp(torch.autograd.Function):
    """down(silu(gate(x)) * up(x)). x: (..., in), in the dtype of the weights; first: fused gate and up; last: down.
    adapters: A, B of the three, already loaded into first and last."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        first: FusedProjections,
        last: FusedProjections,
        scales: tuple[float, ...],
        *adapters: torch.Tensor,
    ) -> torch.Tensor:
        ctx.first, ctx.last, ctx.scales, ctx.adapter_dtype, ctx.shape = first, last, scales, adapters[0].dtype, x.shape
        wide = first.widen(x.reshape(-1, first.in_features))
        both = wide @ first.forward_weight.t()
        gate, up = both.split(first.widths, dim=1)
        hidden, active = last.input_buffer(both), silu(gate)
        torch.mul(active, up, out=hidden[:, : last.in_features])
        out = last.fill(hidden) @ last.forward_weight.t()
        ctx.save_for_backward(wide, both, active, hidden)
        # Not a view: Llama 4 adds to the output of a layer in place, which autograd forbids for a view.
        return torch.ops.aten._unsafe_view(out, [*x.shape[:-1], last.out_features])

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[Any, ...]:
        (wide, both, active, hidden), first, last = ctx.saved_tensors, ctx.first, ctx.last
        gate, up = both.split(first.widths, dim=1)
        buffer = last.output_buffer(both)
        buffer[:, : last.out_features] = gradient.reshape(len(buffer), -1)
        grad_last = last.split_gradients(
            *last.gradients(*last.split(hidden), buffer), ctx.scales[2:], ctx.adapter_dtype
        )
        grad_hidden = buffer @ last.backward_weight
        buffer = first.output_buffer(both)
        grad_gate, grad_up = buffer[:, : first.out_features].split(first.widths, dim=1)
        torch.mul(grad_hidden, active, out=grad_up)
        torch.ops.aten.silu_backward.grad_input(grad_hidden.mul_(up), gate, grad_input=grad_gate)
        grad_first = first.split_gradients(*first.gradients(*first.split(wide), buffer), ctx.scales, ctx.adapter_dtype)
        grad_x = (buffer @ first.backward_weight).view(ctx.shape) if ctx.needs_input_grad[0] else None
        return grad_x, None, None, None, *grad_first, *grad_last


def fuse_blocks(model: Any, is_same: Callable[..., bool] | None = None) -> int:
    """Replace the forward of every RMSNorm, gated MLP and adapted linear layer that qualifies; returns how many.

    is_same: replaces the numerical test, for models without values (meta tensors).
    """
    is_same = is_same or _is_same
    fast: dict[Any, Any] = {}
    for module in model.modules():  # a module comes before its children
        if module in fast:
            continue
        if _is_norm(module) and is_same(module, partial(_norm, module), module.weight):
            fast[module] = _norm
        elif (layers := _plain(_inside(module, MLP))) and is_same(
            module, partial(_silu_gated, *layers), _weight(layers[0])
        ):
            fast[module] = _mlp(layers)
            fast |= dict.fromkeys(layers)
        elif layers := _plain(_inside(module, QKV)) or _plain([module]):
            siblings = SiblingProjections(layers)
            fast |= {layer: siblings.forward_of(number) for number, layer in enumerate(layers)}
    for module, forward in fast.items():
        if forward:
            module.forward = MethodType(forward, module)
    _release_files(model)
    return sum(map(bool, fast.values()))


def _release_files(model: Any) -> None:
    """Copy the remaining frozen weights, so that memory-mapped weight files are released.

    A file stays in memory while one tensor uses it, even if the other weights were copied into fused matrices. Fused
    weights are views and not contiguous, so they are not copied again.
    """
    for part in model.parameters():
        if part.device.type == "cpu" and not part.requires_grad and part.is_contiguous():
            part.data = part.data.clone()


def _is_norm(module: Any) -> bool:
    if not isinstance(getattr(module, "variance_epsilon", None), float) or not _has_fused_dtype(module.weight):
        return False
    _, _, *more = signature(type(module).forward).parameters  # self, x; a gated norm has more
    return not more


def _inside(module: Any, names: Sequence[str]) -> list[Any]:
    return [getattr(module, name, None) for name in names]


def _plain(layers: list[Any]) -> list[Any]:
    """Return the layers if all are plain, frozen and of one dtype, else []."""
    if not all(is_plain(layer) for layer in layers):
        return []
    weights = [_weight(layer) for layer in layers]
    suit = all(_has_fused_dtype(weight) and not weight.requires_grad for weight in weights)
    return layers if suit and len({weight.dtype for weight in weights}) == 1 else []


def _weight(layer: Any) -> torch.Tensor:
    return parts_of(layer)[0]


def _is_same(module: Any, form: Callable[[torch.Tensor], torch.Tensor], weight: torch.Tensor) -> bool:
    """Whether both forms agree on random rows of ordinary and of very small size (the small ones test the epsilon)."""
    rows = torch.randn(1, 4, weight.shape[-1], generator=torch.Generator().manual_seed(0))
    rows[:, 2:] *= 1e-3
    half = weight.dtype != torch.float32
    tolerance = {"rtol": 2e-2, "atol": 1e-3} if half else {"rtol": 1e-4, "atol": 1e-6}
    rows = rows.to(weight.device, weight.dtype)
    with torch.no_grad(), torch.autocast(weight.device.type, weight.dtype, enabled=half):
        return bool(torch.allclose(module(rows), form(rows), **tolerance))


def _silu_gated(gate: Any, up: Any, down: Any, x: torch.Tensor) -> torch.Tensor:
    out: torch.Tensor = down(silu(gate(x)) * up(x))
    return out


def _norm(self: Any, x: torch.Tensor) -> torch.Tensor:
    if not _has_fused_dtype(x) or x.dtype != self.weight.dtype or self.weight.requires_grad:
        return type(self).forward(self, x)
    if x.is_cuda:  # torch has a fused kernel, which autocast would run in fp32
        with torch.autocast("cuda", enabled=False):
            return rms_norm(x, self.weight.shape, self.weight, self.variance_epsilon)
    return FusedRmsNorm.apply(x, self.weight, self.variance_epsilon)


def _mlp(layers: Sequence[Any]) -> Any:
    parts = [parts_of(layer) for layer in layers]
    first, last = FusedProjections(parts[:2]), FusedProjections(parts[2:])

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        if not _has_fused_dtype(x) or not all(is_plain(layer, x) for layer in layers):
            return type(self).forward(self, x)
        parts = [parts_of(layer) for layer in layers]
        (scales, adapters), (scale, adapter) = first.load_adapters(parts[:2]), last.load_adapters(parts[2:])
        return FusedGatedMlp.apply(x, first, last, scales + scale, *adapters, *adapter)

    return forward


def _has_fused_dtype(x: torch.Tensor) -> bool:
    return x.dtype in FUSED_DTYPES.get(x.device.type, ())
