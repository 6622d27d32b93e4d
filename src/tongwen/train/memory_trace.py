"""Estimate a training step's memory: run it on fake tensors, which have shapes and no memory, and count their bytes.

A formula for activations covers one architecture and one way to compute it. Here the model itself runs, with the
attention, the loss, the fused layers and the autocast of the real step, on torch's fake tensors. Each storage is counted
by purpose from creation to release. The sum therefore includes a tied head's second gradient and autocast's copies.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tongwen.train.packing import Loss

ROWS = 8  # learned rows in the trace; further rows only add logits of a known size
LOGIT = {
    torch.bfloat16: 2,
    torch.float16: 6,
    torch.float32: 4,
}  # bytes per logit; accelerate copies fp16 logits to fp32


class DocumentLengths(list[int]):
    """Stand-in for a pack's borders that gives the attention its document lengths; fake tensors have no values."""

    def diff(self) -> DocumentLengths:
        return self

    def tolist(self) -> list[int]:
        return list(self)


# Parts of a step. The peak of each is the same at any number of layers, except that of BETWEEN, the backward from layer to
# layer, which lies between the peaks before and after it.
FORWARD, HEAD, LAST_LAYER, BETWEEN, FIRST_LAYER = range(5)
AT_ANY_DEPTH = (FORWARD, HEAD, LAST_LAYER, FIRST_LAYER)


class LiveTensors(TorchDispatchMode):
    """Count the bytes of live storages by purpose; keep the counts at the peak of each part of a step."""

    def __init__(self) -> None:
        super().__init__()
        self.purpose, self.part = "weights", FORWARD
        self.owners: dict[int, tuple[str, int]] = {}
        self.now: Counter[str] = Counter()
        self.fullest: list[Counter[str]] = [Counter() for _ in range(5)]

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        out = function(*arguments, **(options or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self.add(tensor)
        return out

    def add(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self.owners:
            return
        self.owners[key] = (self.purpose, storage.nbytes())
        self.now[self.purpose] += storage.nbytes()
        weakref.finalize(storage, self._remove, key)
        if self.now.total() > self.fullest[self.part].total():
            self.fullest[self.part] = self.now.copy()

    def rename(self, tensor: torch.Tensor, purpose: str) -> None:
        key = tensor.untyped_storage()._cdata
        before, size = self.owners[key]
        self.owners[key] = (purpose, size)
        self.now[before] -= size
        self.now[purpose] += size

    def _remove(self, key: int) -> None:
        purpose, size = self.owners.pop(key)
        self.now[purpose] -= size


def trace_step(
    model: Any,
    lengths: Sequence[int],
    rows: int,
    loss: Loss,
    head: Any,
    prepare: Callable[[Any], Any],
    *,
    layers: int,
    dtype: torch.dtype,
    passes: int,
) -> list[dict[str, int]]:
    """Return bytes by purpose (weights, gradients, activations, head) at the memory peak of each part of a step.

    model:   on the meta device; trainable parameters require a gradient
    lengths: tokens of a micro-batch's documents; rows: how many of its tokens are learned
    head:    the module whose output is the logits
    prepare: called on the model once its tensors are fake
    dtype:   of the computation
    passes:  micro-batches per step; more than two change nothing
    Raises RuntimeError when the model's shapes depend on values.
    """
    with FakeTensorMode():
        _make_fake(model)
        prepare(model)
        width = head.weight.shape[0]  # with trainable token rows, peft builds the whole weight at each access
        batch, live, arrived = _batch(lengths), LiveTensors(), set[int]()
        trainable = [part for part in model.parameters() if part.requires_grad]
        of_layer = len(trainable) // layers

        def on_gradient(part: torch.nn.Parameter) -> None:
            arrived.add(id(part))
            live.rename(part.grad, "gradients")
            if len(arrived) > len(trainable) - of_layer:
                live.part = FIRST_LAYER
            elif len(arrived) > of_layer:
                live.part = BETWEEN

        def on_head(module: Any, arguments: Any) -> None:
            live.purpose = "head"
            arguments[0].register_hook(lambda gradient: setattr(live, "part", LAST_LAYER))

        for part in trainable:
            part.register_post_accumulate_grad_hook(on_gradient)
        head.register_forward_pre_hook(on_head)
        with live:
            for part in (*model.parameters(), *model.buffers()):
                live.add(part)
            for _ in range(min(passes, 2)):
                live.purpose, live.part = "activations", FORWARD
                arrived.clear()
                with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                    total, _ = loss(model, batch)
                live.purpose, live.part = "activations", HEAD
                total.backward()
                del total
    for part in (FORWARD, HEAD):  # later parts hold no logits
        live.fullest[part]["head"] += (rows - ROWS) * width * LOGIT[dtype]
    return [dict(part) for part in live.fullest]


def _make_fake(model: Any) -> None:
    """Replace meta tensors by fake CPU tensors; tied ones stay tied, trainable ones become fp32."""
    made: dict[int, torch.Tensor] = {}
    for module in model.modules():
        for held in (module._parameters, module._buffers):
            for name, tensor in held.items():
                if tensor is not None:
                    held[name] = made.setdefault(id(tensor), _fake(tensor))


def _fake(tensor: torch.Tensor) -> torch.Tensor:
    learns = tensor.requires_grad
    empty = torch.empty(tensor.shape, dtype=torch.float32 if learns else tensor.dtype, device="cpu")
    return torch.nn.Parameter(empty, requires_grad=learns) if isinstance(tensor, torch.nn.Parameter) else empty


def _batch(lengths: Sequence[int]) -> dict[str, Any]:
    """Return a micro-batch in the form of `train.packing.pack`."""
    tokens, borders = sum(lengths), DocumentLengths(lengths)
    return {
        "input_ids": torch.zeros(1, tokens, dtype=torch.int64),
        "position_ids": torch.zeros(1, tokens, dtype=torch.int64),
        "cu_seq_lens_q": borders,
        "cu_seq_lens_k": borders,
        "max_length_q": max(lengths),
        "max_length_k": max(lengths),
        "rows": torch.zeros(ROWS, dtype=torch.int64),
        "targets": torch.zeros(ROWS, dtype=torch.int64),
        "learned": ROWS,
        "tokens": tokens,
    }
