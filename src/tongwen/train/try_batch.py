"""A micro-batch tried before the run: whether it fits the device is seen, and not reckoned.

An estimate of activations knows neither what the allocator breaks up nor what else lives on the GPU; a micro-batch costs a
second. What later steps need beside it, such as the optimizer's state, is held in reserve meanwhile.
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
    """Whether a micro-batch goes through the model and back so many times beside `reserve` bytes. Gradients, mode and random
    state are left as they were."""
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
            torch.accelerator.reset_peak_memory_stats()  # what was held in reserve is none that the run took


def _forward_backward(model: Any, batch: dict[str, Any], loss: Loss, passes: int, reserve: int) -> None:
    """A function of its own, so that nothing of what filled the memory is held when it has failed."""
    held = torch.empty(reserve, dtype=torch.uint8, device=batch["input_ids"].device)
    for _ in range(passes):
        loss(model, batch)[0].backward()
    del held
