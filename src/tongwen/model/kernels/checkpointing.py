"""What is done to each layer of a model for speed or memory, and changes no number: recompute it, or compile it."""

from __future__ import annotations

import importlib.util
import os
import shutil
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from tongwen.core.errors import MachineError
from tongwen.core.i18n import _
from tongwen.model.kernels import packed_attention


def recompute(model: Any, **options: Any) -> None:
    """Each layer keeps its input alone, and is computed anew in the backward. how: words of torch.utils.checkpoint."""
    kwargs = {"use_reentrant": False, **options}
    if hasattr(model, "activation_checkpointing_enable"):  # its newer name
        model.activation_checkpointing_enable(kwargs)
    else:
        model.gradient_checkpointing_enable(kwargs)


def keep_activations(model: Any) -> None:
    """The opposite: layers keep what their backward needs."""
    for module in model.modules():
        if getattr(module, "gradient_checkpointing", False):
            module.gradient_checkpointing = False


def compile_layers(model: Any) -> int:
    """Compile each decoder layer in its place; returns how many. They are alike, so one of them is compiled and serves all;
    what stands between them (the head over learned rows, the loss) stays as it is. Raises MachineError without a compiler."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    device = next(model.parameters()).device.type
    compiler = importlib.util.find_spec("triton") if device == "cuda" else shutil.which(os.environ.get("CXX", "g++"))
    if not layers or not compiler:
        raise MachineError(
            _("this model has no layers to compile")
            if compiler
            else _("no compiler for {device} was found").format(device=device),
            place="compile",
            remedy=_("compile: false, or install triton (GPU) or g++ (CPU)"),
        )
    packed_attention.leave_out_of_graphs()
    for layer in layers:
        layer.compile(dynamic=True)
    return len(layers)


def uncompiled(model: Any) -> AbstractContextManager[Any]:
    """Inside, compiled layers run as they are written: each new length of a text that is generated would be compiled again."""
    compiled = any(module._compiled_call_impl is not None for module in model.modules())
    return torch.compiler.set_stance("force_eager") if compiled else nullcontext()
