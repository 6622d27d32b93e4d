"""RMSNorm and the gated MLP as one operation each, for training on a CPU, where memory traffic costs more than arithmetic.

Written as single modules, each step of theirs reads and writes a whole activation, and autograd keeps most of them. Here
what can be overwritten is overwritten, and the MLP keeps two of its five wide activations. A module gets the fast form
only when it is proven, on random rows, to compute what that form computes; all else (Gemma's 1 + weight, other
activations, layers that peft must handle itself) stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from inspect import signature
from types import MethodType
from typing import Any

import torch
from torch.nn.functional import silu

from tongwen.model.lora import is_plain, parts_of


class RmsNorm(torch.autograd.Function):
    """x: (..., width); weight: (width,), frozen. Saves x and one number per row, which is fp32 at least."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide)
        inverse = norm.square_().div_(x.shape[-1]).add_(epsilon).rsqrt_()
        ctx.save_for_backward(x, weight, inverse)
        return (x * inverse).to(x.dtype).mul_(weight)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[Any, ...]:
        x, weight, inverse = ctx.saved_tensors
        own, x = x.dtype, x.to(inverse.dtype)
        of_x = (gradient * weight).to(inverse.dtype)
        along = torch.linalg.vecdot(of_x, x).unsqueeze(-1).mul_(inverse.pow(3)).div_(-x.shape[-1])
        return of_x.mul_(inverse).addcmul_(x, along).to(own), None, None


class GatedMlp(torch.autograd.Function):
    """down(silu(gate(x)) * up(x)), each y = x Wᵀ + s (x Aᵀ) Bᵀ as in LoraProduct.

    x: (..., in); weights: (out, in), frozen, in the number type of x; a: (r, in); b: (out, r). Gate and up read x once
    for both their A.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, scales: tuple[float, float, float], *parts: torch.Tensor) -> torch.Tensor:
        ctx.own = parts[1].dtype
        gate_w, gate_a, gate_b, up_w, up_a, up_b, down_w, down_a, down_b = (part.to(x.dtype) for part in parts)
        flat = x.reshape(-1, x.shape[-1])
        both_a = torch.cat([gate_a, up_a])  # (2 r, in)
        low = flat @ both_a.t()  # (T, 2 r)
        rank = len(gate_a)
        gate = (flat @ gate_w.t()).addmm_(low[:, :rank], gate_b.t(), alpha=scales[0])
        up = (flat @ up_w.t()).addmm_(low[:, rank:], up_b.t(), alpha=scales[1])
        hidden = silu(gate).mul_(up)
        of_hidden = hidden @ down_a.t()  # (T, r)
        out = (hidden @ down_w.t()).addmm_(of_hidden, down_b.t(), alpha=scales[2])
        ctx.save_for_backward(
            flat, gate, up, low, of_hidden, both_a, gate_w, gate_b, up_w, up_b, down_w, down_a, down_b
        )
        ctx.scales, ctx.shape = scales, x.shape
        return out.view(x.shape)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[Any, ...]:
        flat, gate, up, low, of_hidden, both_a, gate_w, gate_b, up_w, up_b, down_w, down_a, down_b = ctx.saved_tensors
        gate_scale, up_scale, down_scale = ctx.scales
        rank = gate_b.shape[1]
        gradient = gradient.reshape(-1, gradient.shape[-1])
        of_low = gradient @ down_b  # (T, r)
        of_up = (gradient @ down_w).addmm_(of_low, down_a, alpha=down_scale)  # (T, wide), the hidden rows' so far
        active = silu(gate)
        of_down_a = (of_low.t() @ (active * up)).to(ctx.own).mul_(down_scale)
        of_down_b = (of_hidden.t() @ gradient).t().to(ctx.own).mul(down_scale)
        of_gate = of_up * up
        of_up.mul_(active)
        torch.ops.aten.silu_backward.grad_input(of_gate, gate, grad_input=of_gate)
        of_low = torch.cat([(of_gate @ gate_b).mul_(gate_scale), (of_up @ up_b).mul_(up_scale)], dim=1)  # (T, 2 r)
        of_a = (of_low.t() @ flat).to(ctx.own)
        of_gate_b = (low[:, :rank].t() @ of_gate).t().to(ctx.own).mul(gate_scale)
        of_up_b = (low[:, rank:].t() @ of_up).t().to(ctx.own).mul(up_scale)
        of_x = None
        if ctx.needs_input_grad[0]:
            of_x = (of_gate @ gate_w).addmm_(of_up, up_w).addmm_(of_low, both_a).view(ctx.shape)
        return of_x, None, None, of_a[:rank], of_gate_b, None, of_a[rank:], of_up_b, None, of_down_a, of_down_b


def fuse_blocks(model: Any, is_same: Callable[[Any, Any], bool] | None = None) -> int:
    """Give every RMSNorm and gated MLP that qualifies its fast forward; returns how many. is_same: decides in the place of
    the proof, where there are only shapes."""
    count = 0
    for module in model.modules():
        fast = _fast_form(module)
        if fast and (is_same or _is_same)(module, fast):
            module.forward = MethodType(fast, module)
            count += 1
    return count


def _fast_form(module: Any) -> Any:
    if list(signature(type(module).forward).parameters)[2:]:  # more than (self, x): a norm with a gate, for example
        return None
    if isinstance(getattr(module, "variance_epsilon", None), float) and _is_lean(module.weight):
        return _norm
    layers = [getattr(module, name, None) for name in ("gate_proj", "up_proj", "down_proj")]
    if all(is_plain(layer) and _is_lean(parts_of(layer)[0]) for layer in layers):
        return _mlp
    return None


def _is_same(module: Any, fast: Any) -> bool:
    """Rows of ordinary and of very small size give the same through both forms (the small ones show the epsilon)."""
    weight = module.weight if fast is _norm else parts_of(module.gate_proj)[0]
    rows = torch.randn(1, 4, weight.shape[-1], generator=torch.Generator().manual_seed(0))
    rows[:, 2:] *= 1e-3
    rows = rows.to(weight.dtype)
    half = weight.dtype != torch.float32
    near = {"rtol": 2e-2, "atol": 1e-3} if half else {"rtol": 1e-4, "atol": 1e-6}
    with torch.no_grad(), torch.autocast("cpu", weight.dtype, enabled=half):
        return bool(torch.allclose(module(rows), fast(module, rows), **near))


def _norm(self: Any, x: torch.Tensor) -> torch.Tensor:
    if not _is_lean(x) or x.dtype != self.weight.dtype or self.weight.requires_grad:
        return type(self).forward(self, x)
    return RmsNorm.apply(x, self.weight, self.variance_epsilon)


def _mlp(self: Any, x: torch.Tensor) -> torch.Tensor:
    layers = (self.gate_proj, self.up_proj, self.down_proj)
    if not _is_lean(x) or not all(is_plain(layer, x) for layer in layers):
        return type(self).forward(self, x)
    parts = [parts_of(layer) for layer in layers]
    return GatedMlp.apply(x, tuple(scale for *_, scale in parts), *(one for part in parts for one in part[:3]))


def _is_lean(x: torch.Tensor) -> bool:
    return bool(x.device.type == "cpu" and x.dtype in (torch.float32, torch.bfloat16))
