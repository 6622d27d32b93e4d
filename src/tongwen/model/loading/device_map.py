"""Decide how to load a model that may not fit in memory: with fewer bits, or over several GPUs."""

from __future__ import annotations

import psutil
import torch

from tongwen.core import console
from tongwen.core.errors import MachineError
from tongwen.core.i18n import _
from tongwen.model.loading.architecture import build_on_meta, load_config
from tongwen.model.loading.model_ref import ModelRef

SPARE = 1.2  # memory for weights and activations, relative to the weights
BITS = {"8bit": "int8", "4bit": "nf4"}


def choose(ref: ModelRef, weights: str, device: str, dtype: torch.dtype) -> tuple[bool, str]:
    """Return (whether to use all GPUs, `quantize` for `load_model`).

    weights: full, 8bit, 4bit, or auto, which takes the most bits that fit.

    Raises MachineError when `auto` finds no size that fits.
    """
    free_memory = (
        [torch.cuda.mem_get_info(index)[0] for index in range(torch.cuda.device_count())] if device == "cuda" else []
    )
    if weights != "auto" and len(free_memory) < 2:
        return False, BITS.get(weights, "")
    numbers = SPARE * sum(tensor.numel() for tensor in build_on_meta(load_config(ref)).parameters())
    needed = {"full": numbers * dtype.itemsize, "8bit": numbers, "4bit": numbers * 0.6}  # embeddings keep their bits
    available = sum(free_memory) or psutil.virtual_memory().available
    if weights == "auto":
        weights = next((name for name, wanted in needed.items() if wanted <= available), "")
        if not weights:
            raise MachineError(
                _("not enough memory: the model needs {needed_4bit} in 4 bits, and {room} are free").format(
                    needed_4bit=console.human_bytes(needed["4bit"]), room=console.human_bytes(available)
                ),
                place=ref.name,
                remedy=_("use a smaller model, or open its .gguf with llama.cpp"),
            )
        if weights != "full":
            console.notice(_("loaded in {weights}: the full model does not fit").format(weights=weights))
    return len(free_memory) > 1 and needed[weights] > max(free_memory), BITS.get(weights, "")
