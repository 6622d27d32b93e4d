"""Estimate a training stage's memory in advance: trace a step of its own model on tensors without values.

Layers are alike, so a deep model is traced twice with a few layers, and the rest is extrapolated. If a model cannot be
traced (its shapes depend on values), a formula for Llama-like layers is used, and the estimate is marked accordingly.
"""

from __future__ import annotations

import importlib.util
import sys
import time
from collections.abc import Collection, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

import psutil
import torch
from transformers.modeling_layers import GradientCheckpointingLayer

from tongwen.model.adapters import attach
from tongwen.model.adapters.chain import open_adapter_chain
from tongwen.model.kernels import packed_attention
from tongwen.model.kernels.checkpointing import recompute
from tongwen.model.kernels.fused_blocks import FUSED_DTYPES, fuse_blocks
from tongwen.model.kernels.loss import head_rows, learned_loss, use_blockwise_head
from tongwen.model.loading.architecture import build_on_meta
from tongwen.model.loading.model_ref import ModelRef
from tongwen.model.loading.quantized import without_compiler
from tongwen.model.loading.quiet import quiet
from tongwen.recipe.training import AdapterConfig, TrainedPart
from tongwen.train.memory import (
    CUDA_CONTEXT,
    QUANTIZED,
    SINGLE_PROCESS,
    STATE_BYTES,
    ModelShape,
    ShardingPlan,
    kept_for_backward,
    rough_shape,
)
from tongwen.train.memory_trace import AT_ANY_DEPTH, LOGIT, trace_step
from tongwen.train.packing import BatchPlan, MicroBatches, to_device

ALIKE, ALTERNATING = (2, 4), (4, 8)  # numbers of layers that are traced of a deeper model
PURPOSES = ("weights", "gradients", "optimizer", "activations", "head")
# Libraries that training imports and a plan does not, if installed: bytes of each, measured on Linux.
ONLY_TRAINING = {"peft": 11_000_000, "bitsandbytes": 46_000_000, "datasets": 88_000_000}
LIBRARIES = psutil.Process().memory_info().rss + sum(
    size for name, size in ONLY_TRAINING.items() if name not in sys.modules and importlib.util.find_spec(name)
)


@dataclass(frozen=True)
class MicroBatch:
    """The fullest micro-batch. lengths: of its documents; rows: learned tokens; passes: micro-batches per step."""

    lengths: Sequence[int]
    rows: int
    passes: int

    def cut(self, tokens: int) -> MicroBatch:
        """Return a micro-batch with one document of this length instead."""
        return MicroBatch((tokens,), self.rows * tokens // sum(self.lengths), max(self.passes, 2))


class QuantizedLinear(torch.nn.Linear):
    """A placeholder for a quantised layer, which `fuse_blocks` leaves unchanged."""


@dataclass(frozen=True)
class TrainingSetup:
    """How a model is trained.

    parts: all parts that any phase trains; dtype: dtype of the computation; device: cpu, cuda, ...; sharing: how
    processes divide the model; rows: number of single rows that are trained, for new pieces.
    """

    adapter: AdapterConfig
    parts: Collection[TrainedPart]
    dtype: torch.dtype
    device: str
    optimizer: str = "adamw"
    checkpointing: bool = False
    sharding: ShardingPlan = SINGLE_PROCESS
    rows: int = 0

    @property
    def quantize(self) -> str:
        return self.adapter.quantize if self.adapter.method == "qlora" else ""


def shape_of(config: Any, setting: TrainingSetup) -> ModelShape:
    """Return parameter counts and widths of the adapted model."""
    rough = rough_shape(config)
    model = _build_on_meta(config, setting)[0].model
    parameters = sum(part.numel() for part in model.parameters())
    of_layers = [
        sum(part.numel() for part in module.parameters())
        for module in model.modules()
        if isinstance(module, GradientCheckpointingLayer)
    ] or [parameters // rough.layers]
    return replace(
        rough,
        parameters=parameters,
        trainable=sum(part.numel() for part in model.parameters() if part.requires_grad),
        of_layer=max(of_layers),
        outside=max(parameters - sum(of_layers), 0),
    )


@dataclass(frozen=True)
class MemoryEstimate:
    """bytes: by purpose, and their sum `peak`; rehearsed: whether a traced step or a formula gave them."""

    shape: ModelShape
    bytes: dict[str, int]
    rehearsed: bool


def estimate_memory(config: Any, setting: TrainingSetup, micro: MicroBatch) -> MemoryEstimate:
    """Return the memory that each process needs to train this model."""
    shape = shape_of(config, setting)
    layers = shape.layers
    try:
        few, more = _layer_counts(config)
        if layers <= more:
            parts = _trace(config, setting, micro, layers)
        else:
            small, large = (_trace(config, setting, micro, count) for count in (few, more))
            parts = [_extrapolate(small[part], large[part], (layers - more) / (more - few)) for part in AT_ANY_DEPTH]
        rehearsed = True
    except (RuntimeError, TypeError, AttributeError, KeyError):  # what an unknown model's code raises without values
        parts, rehearsed = [_by_formula(config, setting, micro, shape)], False
    width, state = setting.dtype.itemsize, STATE_BYTES[setting.optimizer] * shape.trainable
    frozen = QUANTIZED[setting.quantize] if setting.quantize else width
    found = [
        setting.sharding.of({**dict.fromkeys(PURPOSES, 0), **part, "optimizer": state}, shape, width, frozen)
        for part in parts
    ]
    fullest = max(found, key=lambda part: sum(part.values()))
    needs = {"libraries": LIBRARIES if setting.device == "cpu" else CUDA_CONTEXT, **fullest}
    return MemoryEstimate(shape, {**needs, "peak": sum(needs.values())}, rehearsed)


def _trace(config: Any, setting: TrainingSetup, micro: MicroBatch, layers: int) -> list[dict[str, int]]:
    adapted, matrices = _build_on_meta(_with_layers(config, layers), setting)
    model = adapted.model
    if not getattr(model, "_supports_attention_backend", False):
        raise TypeError("it has its own attention implementation")
    if setting.checkpointing:
        recompute(model, preserve_rng_state=False)  # tensors without values use no random numbers
    parts = trace_step(
        model,
        micro.lengths,
        _spare(model, setting, micro.rows),
        learned_loss,
        model.get_output_embeddings(),
        lambda model: _prepare(model, setting),
        layers=layers,
        dtype=setting.dtype,
        passes=micro.passes,
    )
    if setting.quantize:
        width, spared = setting.dtype.itemsize, sum(matrices)
        for part in filter(None, parts):  # a part that a step does not have is empty
            part["weights"] -= int(spared * (width - QUANTIZED[setting.quantize]))
            part["activations"] += max(matrices, default=0) * width  # one matrix is de-quantised at a time
    return parts


def _prepare(model: Any, setting: TrainingSetup) -> None:
    """Prepare the model as the stage does before its first step."""
    model.set_attn_implementation(packed_attention.register())
    model.config.use_cache = False
    model.train()
    if setting.sharding.is_whole and setting.dtype in FUSED_DTYPES.get(setting.device, ()):
        fuse_blocks(model, is_same=lambda *_: True)


def _spare(model: Any, setting: TrainingSetup, rows: int) -> int:
    """Turn on blockwise logits if the stage does; returns how many of the rows of logits exist at the same time."""
    if setting.sharding.is_whole and setting.dtype != torch.float16 and use_blockwise_head(model, None):
        return min(rows, head_rows(setting.device))
    return rows


def estimate_files(
    config: Any, setting: TrainingSetup, phases: Sequence[Collection[TrainedPart]]
) -> tuple[int, list[int]]:
    """Return (bytes of the result's weights, bytes of a checkpoint in each phase). A checkpoint has the weights that
    peft or transformers saves, and the optimizer's state for the phase's parts."""
    adapted, _ = _build_on_meta(config, setting)
    whole = sum(part.numel() for part in adapted.model.parameters())
    if hasattr(adapted.model, "peft_config"):  # peft saves both names of a tied matrix that it has copied
        named = adapted.model.named_parameters(remove_duplicate=False)
        saved = 4 * sum(part.numel() for _, part in named if part.requires_grad)
    else:
        saved = 4 * whole
    state = STATE_BYTES[setting.optimizer] + 4 * setting.sharding.engine.startswith("zero")  # and the fp32 originals
    sizes = []
    for parts in phases:
        adapted.train_only(parts)
        learning = sum(part.numel() for part in adapted.model.parameters() if part.requires_grad)
        sizes.append(saved + state * learning)
    result = whole * getattr(config.dtype, "itemsize", 4) if adapted.trains_only_rows else saved
    return result, sizes


def _build_on_meta(config: Any, setting: TrainingSetup) -> tuple[attach.AdaptedModel, list[int]]:
    """Return the adapted model on the meta device, and the sizes of its quantisable matrices."""
    model = build_on_meta(config).to(attach.base_dtype(setting.parts, setting.dtype))
    head = model.get_output_embeddings()
    linear = [module for module in model.modules() if isinstance(module, torch.nn.Linear) and module is not head]
    if setting.quantize:
        for module in linear:
            module.__class__ = QuantizedLinear
    adapter = setting.adapter.model_copy(update={"continue_from": None})  # same shapes, no files
    with torch.device("meta"), quiet(), without_compiler():
        rows = list(range(setting.rows))
        adapted = attach.make_trainable(model, adapter, rows, trained=setting.parts, new_rows=[0], steps=100)
    return adapted, [module.weight.numel() for module in linear]


def _with_layers(config: Any, layers: int) -> Any:
    """Return the config with this number of layers."""
    cut = deepcopy(config)
    text = cut.get_text_config()
    whole = text.num_hidden_layers
    for name, value in list(vars(text).items()):
        if isinstance(value, list) and len(value) == whole:  # one entry for each layer
            setattr(text, name, value[:layers])
    text.num_hidden_layers = layers
    return cut


def _layer_counts(config: Any) -> tuple[int, int]:
    kinds = getattr(config.get_text_config(), "layer_types", None) or [""]
    return ALIKE if len({*kinds}) == 1 else ALTERNATING


def _extrapolate(small: dict[str, int], large: dict[str, int], times: float) -> dict[str, int]:
    """Extrapolate from few layers to all: add the difference `times` to the larger measurement."""
    return {purpose: round(size + (size - small.get(purpose, 0)) * times) for purpose, size in large.items()}


def _by_formula(config: Any, setting: TrainingSetup, micro: MicroBatch, shape: ModelShape) -> dict[str, int]:
    adapted, matrices = _build_on_meta(config, setting)
    model = adapted.model
    width = setting.dtype.itemsize
    weights = sum(part.numel() * (4 if part.requires_grad else part.itemsize) for part in model.parameters())
    if setting.quantize:
        weights -= int(sum(matrices) * (width - QUANTIZED[setting.quantize]))
    return {
        "weights": weights,
        "gradients": 4 * shape.trainable,
        "activations": sum(micro.lengths) * kept_for_backward(shape, checkpointing=setting.checkpointing) * width,
        "head": _spare(model, setting, micro.rows) * shape.vocabulary * LOGIT[setting.dtype],
    }


def measure(place: ModelRef, setting: TrainingSetup, store: Any, plan: BatchPlan) -> tuple[float, float]:
    """Return (seconds per token forward and backward, seconds per optimizer step), measured with the real weights on
    one micro-batch of the plan, after a warm-up."""
    model, _ = open_adapter_chain(place, attach.base_dtype(setting.parts, setting.dtype), setting.quantize)
    rows = list(range(min(setting.rows, len(model.get_input_embeddings().weight))))  # new rows may not exist yet
    adapted = attach.make_trainable(model, setting.adapter, rows, trained=setting.parts, new_rows=[0], steps=100)
    for part in adapted.trainable:
        part.data = part.data.float()
    if not setting.quantize:
        adapted.model.to(setting.device)
    _prepare(adapted.model, setting)
    _spare(adapted.model, setting, 0)
    if setting.checkpointing:
        recompute(adapted.model)
    optimizer = torch.optim.AdamW(adapted.trainable, lr=0.0)
    batch = to_device(MicroBatches(store, [plan.micro[0][0]], packed=True)[0], adapted.model)
    for _ in range(2):
        began = time.monotonic()
        with torch.autocast(setting.device, setting.dtype, enabled=setting.dtype != torch.float32):
            learned_loss(adapted.model, batch)[0].backward()
        backward_ended = _now(setting.device)
        optimizer.step()
        ended = _now(setting.device)
    return (backward_ended - began) / batch["tokens"], ended - backward_ended


def _now(device: str) -> float:
    """Return the time after the device has finished its queued work."""
    if device != "cpu":
        torch.accelerator.synchronize()
    return time.monotonic()
