"""Run a micro-batch before training to see whether it fits the device.

An estimate of activations knows neither the allocator's fragmentation nor other users of the GPU; a trial costs a second.
Meanwhile the memory that later steps need as well, such as the optimizer's state, is reserved.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch

from tongwen.core.errors import is_out_of_memory
from tongwen.train.packing import Loss, to_device


def fits(
    model: Any, batch: dict[str, Any], loss: Loss, computing: AbstractContextManager[None], *, passes: int, reserve: int
) -> bool:
    """Return whether `passes` forwards and backwards of a micro-batch fit beside `reserve` bytes.

    Restores gradients, mode and random state. computing: context of the forward, such as autocast.
    """
    was_training = model.training
    model.train()
    try:
        with torch.random.fork_rng(), computing:
            _forward_backward(model, to_device(batch, model), loss, passes, reserve)
        return True
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return False
    finally:
        model.zero_grad(set_to_none=True)
        model.train(was_training)
        if torch.accelerator.is_available():
            torch.accelerator.empty_cache()
            torch.accelerator.reset_peak_memory_stats()  # the reserve is not part of the run's peak


def _forward_backward(model: Any, batch: dict[str, Any], loss: Loss, passes: int, reserve: int) -> None:
    """Run the passes; a separate function, so that after a failure no local variable keeps memory."""
    held = torch.empty(reserve, dtype=torch.uint8, device=batch["input_ids"].device)
    for _ in range(passes):
        loss(model, batch)[0].backward()
    del held
