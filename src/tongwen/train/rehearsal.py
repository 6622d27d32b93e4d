"""A training step that is only rehearsed: its tensors have shapes and no memory, and what would lie there is counted.

A formula for activations knows one architecture and one way to compute it. Here the model itself runs, with the
attention, the loss, the fused layers and the autocast of the real step, on torch's fake tensors; each storage is counted
from its birth to its end under the purpose that it is made for. So a tied head's second gradient, or the copies that
autocast keeps, are in the sum because they are in the step.
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

from tongwen.train.audit import Loss

ROWS = 8  # learned rows that are rehearsed; all more of them are logits of a known size


class Borders(list[int]):
    """Lengths of a pack's documents where its attention asks the borders for them: fake tensors have no values."""

    def diff(self) -> Borders:
        return self

    def tolist(self) -> list[int]:
        return list(self)


class Live(TorchDispatchMode):
    """Bytes of the storages that are alive, by purpose, and how they stood when they were most: in the first part of the
    step, which ends when half of the gradients are there, and in the second."""

    def __init__(self) -> None:
        super().__init__()
        self.purpose, self.part = "weights", 0
        self.owners: dict[int, tuple[str, int]] = {}
        self.now: Counter[str] = Counter()
        self.fullest: list[Counter[str]] = [Counter(), Counter()]

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        out = function(*arguments, **(options or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self.enter(tensor)
        return out

    def enter(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self.owners:
            return
        self.owners[key] = (self.purpose, storage.nbytes())
        self.now[self.purpose] += storage.nbytes()
        weakref.finalize(storage, self._leave, key)
        if self.now.total() > self.fullest[self.part].total():
            self.fullest[self.part] = self.now.copy()

    def rename(self, tensor: torch.Tensor, purpose: str) -> None:
        key = tensor.untyped_storage()._cdata
        before, size = self.owners[key]
        self.owners[key] = (purpose, size)
        self.now[before] -= size
        self.now[purpose] += size

    def _leave(self, key: int) -> None:
        purpose, size = self.owners.pop(key)
        self.now[purpose] -= size


def rehearse(
    model: Any,
    lengths: Sequence[int],
    rows: int,
    loss: Loss,
    head: Any,
    prepare: Callable[[Any], Any],
    *,
    bf16: bool,
    passes: int,
) -> list[dict[str, int]]:
    """Bytes by purpose (weights, gradients, activations, head) at the fullest of each half of a step.

    model:   on the meta device; what learns requires a gradient
    lengths: tokens of a micro-batch's documents; rows: how many of its tokens are learned
    head:    the module whose output is the logits
    prepare: called on the model once its tensors are fake
    passes:  micro-batches per step; beyond two nothing changes
    Raises RuntimeError where the model's shapes depend on values.
    """
    with FakeTensorMode():
        _pretend(model)
        prepare(model)
        batch, live, arrived = _batch(lengths), Live(), set[int]()
        learners = [part for part in model.parameters() if part.requires_grad]

        def on_gradient(part: torch.nn.Parameter) -> None:
            arrived.add(id(part))
            live.rename(part.grad, "gradients")
            if 2 * len(arrived) > len(learners):
                live.part = 1

        for part in learners:
            part.register_post_accumulate_grad_hook(on_gradient)
        head.register_forward_pre_hook(lambda *_: setattr(live, "purpose", "head"))
        with live:
            for part in (*model.parameters(), *model.buffers()):
                live.enter(part)
            for _ in range(min(passes, 2)):
                live.purpose, live.part = "activations", 0
                arrived.clear()
                with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                    total, _ = loss(model, batch)
                live.purpose = "activations"
                total.backward()
                del total
    more = (rows - ROWS) * head.weight.shape[0] * (2 if bf16 else head.weight.itemsize)
    for half in live.fullest[:1]:  # in the second half the logits are gone
        half["head"] += more
    return [dict(half) for half in live.fullest]


def _pretend(model: Any) -> None:
    """Fake tensors in the place of meta ones, on a CPU that computes nothing; tied ones stay tied, learning ones are fp32."""
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
    """A micro-batch as `train.batches.pack` makes it."""
    tokens, borders = sum(lengths), Borders(lengths)
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
