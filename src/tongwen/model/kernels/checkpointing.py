"""Activation recomputation and compilation of a model's layers, for memory and speed without changing results."""

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
    """Recompute each layer in the backward and keep only its input. options: arguments of torch.utils.checkpoint."""
    kwargs = {"use_reentrant": False, **options}
    if hasattr(model, "activation_checkpointing_enable"):  # its newer name
        model.activation_checkpointing_enable(kwargs)
    else:
        model.gradient_checkpointing_enable(kwargs)


def keep_activations(model: Any) -> None:
    """Turn recomputation off: layers keep the activations that their backward needs."""
    for module in model.modules():
        if getattr(module, "gradient_checkpointing", False):
            module.gradient_checkpointing = False


def compile_layers(model: Any) -> int:
    """Compile each decoder layer in place; returns how many.

    The layers are alike, so one compiled graph serves all. The head and the loss are not compiled. Raises MachineError
    without layers to compile or without a compiler.
    """
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
    """Run compiled layers in eager mode in this block: generation would recompile them for each new text length."""
    compiled = any(module._compiled_call_impl is not None for module in model.modules())
    return torch.compiler.set_stance("force_eager") if compiled else nullcontext()
