"""Estimate the memory and arithmetic of a training run; tune the allocator of a CPU run."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from tongwen.core import distributed, malloc
from tongwen.recipe.training import Training

LARGEST_KEPT = 32 << 20  # bytes; glibc's upper limit for this threshold


@dataclass(frozen=True)
class ModelShape:
    """Parameter counts and widths of a model.

    parameters: all; trainable: those with a gradient; of_layer: those of the largest layer; outside: those of no layer
    """

    parameters: int
    trainable: int
    layers: int
    hidden: int
    intermediate: int
    vocabulary: int
    of_layer: int = 0
    outside: int = 0


# nf4: each block of 64 weights has a one-byte scale; each 256 of those scales have a four-byte scale.
QUANTIZED = {"nf4": 0.5 + 1 / 64 + 4 / (64 * 256), "int8": 1.0}
STATE_BYTES = {"adamw": 8, "adamw_8bit": 2, "paged_adamw_8bit": 2, "adafactor": 0, "muon": 4}  # per parameter
STREAMED = 100_000_000  # bytes that merging and exporting take, whatever the model's size (bench/results/merge.json)
CUDA_CONTEXT = 600_000_000  # bytes of a GPU that CUDA and its libraries take before the first tensor, about

MAX_TOKENS = 65536  # at once; enough to hide the kernel launches of any model

# What each engine shards. ZeRO stage 1: the optimizer; stage 2: gradients as well; stage 3: weights as well.
SHARDED_PURPOSES = {
    "zero1": ("optimizer",),
    "zero2": ("gradients", "optimizer"),
    "zero3": ("weights", "gradients", "optimizer"),
    "fsdp2": ("weights", "gradients", "optimizer"),
}


@dataclass(frozen=True)
class ShardingPlan:
    """How an engine divides a training among processes, each with a GPU of its own.

    engine:    "" for one process, ddp, zero1 to zero3, or fsdp2
    offloaded: purposes kept in host memory
    reshard:   fsdp2: whether a layer's weights are resharded between forward and backward
    bucket:    DeepSpeed: elements of the buffers that collect gradients
    """

    engine: str = ""
    world: int = 1
    offloaded: tuple[str, ...] = ()
    reshard: bool = True
    bucket: int = 0

    @property
    def is_whole(self) -> bool:
        """Whether every process holds the whole model, as `Engine.is_whole` for a run."""
        return self.engine in ("", "ddp")

    def of(self, needs: dict[str, int], shape: ModelShape, width: int, frozen_width: float) -> dict[str, int]:
        """Return the bytes per purpose of one process, given those of a single-process run.

        width: bytes per element in computation; frozen_width: bytes per weight of a layer, which may be quantised.

        DDP collects gradients in buckets, a second copy of them. DeepSpeed in 16 bits keeps trainable weights and gradients
        in 16 bits, and the fp32 master weights with the optimizer. An engine that shards weights gathers two layers at a
        time (the current and the next one), and keeps the parameters outside of layers (embedding, head) gathered.
        """
        out = dict(needs)
        if self.engine == "ddp" and self.world > 1:
            out["gathered"] = needs["gradients"]
        if self.engine.startswith("zero"):
            out["gathered"] = self.bucket * width
            if width == 2:
                out["weights"] -= 2 * shape.trainable
                out["gradients"] //= 2
                out["optimizer"] += 4 * shape.trainable
        shared = SHARDED_PURPOSES.get(self.engine, ())
        for purpose in shared:
            out[purpose] = -(-out[purpose] // self.world)
        if "weights" in shared:
            layers = 2 * shape.of_layer if self.reshard else shape.of_layer * shape.layers
            learning = shape.trainable // shape.layers  # per layer: its full gradient, before the fp32 reduction
            whole = width * shape.outside + int(frozen_width * layers) + (width + 4) * learning
            out["gathered"] = out.get("gathered", 0) + whole
        return {purpose: 0 if purpose in self.offloaded else size for purpose, size in out.items()}


SINGLE_PROCESS = ShardingPlan()


def kept_for_backward(shape: ModelShape, *, checkpointing: bool) -> int:
    """Return the elements per token that the backward needs: inputs of each matrix, each norm and SwiGLU's product.

    An adapter adds little to that.
    """
    per_layer = 13 * shape.hidden + 4 * shape.intermediate
    return shape.hidden * shape.layers + per_layer if checkpointing else per_layer * shape.layers


def rough_shape(config: Any) -> ModelShape:
    """Return the shape of a fully trained Llama with the configuration's widths, without biases and norms."""
    text = config.get_text_config()
    hidden, inner = text.hidden_size, getattr(text, "intermediate_size", None) or 4 * text.hidden_size
    numbers = text.num_hidden_layers * (4 * hidden + 3 * inner) * hidden + text.vocab_size * hidden
    return ModelShape(numbers, numbers, text.num_hidden_layers, hidden, inner, text.vocab_size)


def token_budget(device: str, config: Any, memory: int = 0, *, full: bool = False) -> int:
    """Return the default for the tokens of a micro-batch. memory: bytes of the GPU, 0: unknown; full: all weights train.

    On a CPU with fast matrix products, small packs waste time between the products (2.49 CPU-ms per token with 2048, 2.38
    with 4096, SmolLM2-135M in bf16 with packs of 900 and 1,800 tokens). On a GPU a small model waits for its kernel launches
    (forward and backward 7.45 ms, for 6,144 tokens of a 1B Llama on an H100). So the budget doubles while the activations,
    in 16 bits, take no more than half of the memory that the weights leave free.
    """
    if device == "cpu":
        return 4096
    budget = 8192
    if memory:
        shape = rough_shape(config)
        spare = memory - CUDA_CONTEXT - shape.parameters * (16 if full else 2)
        per_token = 2 * kept_for_backward(shape, checkpointing=False)
        while budget < MAX_TOKENS and 2 * budget * per_token <= spare / 2:
            budget *= 2
    return budget


def device_memory(device: str) -> int:
    """Return the bytes of this process's GPU (cuda, npu, xpu); 0 without a GPU, and for mps, which reports none."""
    mem_get_info = getattr(torch.get_device_module(device), "mem_get_info", None)
    return int(mem_get_info()[1]) if mem_get_info else 0


def own_memory(device: str) -> int:
    """Return `device_memory` in a single-process run, else 0: several processes must agree on one plan."""
    return device_memory(device) if distributed.world_size() == 1 else 0


def is_estimated_to_fit(
    model: Any, config: Training, sharding: ShardingPlan, width: int, tokens: int, memory: int
) -> bool:
    """Return whether a micro-batch of `tokens` fits a GPU without activation recomputation.

    Uses only what is equal on all processes (their GPUs are of one kind), so that all get the same answer. If only some
    recomputed layers, they would request sharded weights in different orders and deadlock.
    """
    rough, learning = rough_shape(model.config), sum(part.numel() for part in model.parameters() if part.requires_grad)
    outside = rough.vocabulary * rough.hidden
    shape = replace(rough, trainable=learning, outside=outside, of_layer=(rough.parameters - outside) // rough.layers)
    weights = sum(part.numel() * part.element_size() for part in model.parameters())
    needs = {"weights": weights, "gradients": 4 * learning, "optimizer": STATE_BYTES[config.optimizer] * learning}
    needed = sum(sharding.of(needs, shape, width, width).values())
    if config.sharded_by == "deepspeed":  # DeepSpeed shards after the audit
        needed = max(needed, needs["weights"] + needs["gradients"])
    activations = tokens * 2 * kept_for_backward(rough, checkpointing=False)
    return bool(CUDA_CONTEXT + needed + activations <= 0.9 * memory)


def flops_per_token(shape: ModelShape, learned_share: float, *, full: bool) -> float:
    """Return FLOPs per token, a multiply-add as two: 6 per weight in full, 4 with an adapter (no frozen gradients)."""
    embedding = shape.vocabulary * shape.hidden
    layers = max(shape.parameters - shape.trainable * (not full) - embedding, 1)
    return (6 if full else 4) * (layers + learned_share * embedding)


def keep_freed_memory() -> None:
    """Let glibc's allocator reuse what this process frees.

    By default each large tensor is a separate mapping. The kernel clears it page by page on first write and takes it back
    on free: 3 to 10 % of a CPU training step. The largest tensors (logits, gradients of an embedding) stay mappings. If
    kept, they would leave holes too small for the next pack, a token longer, and the process would grow for hundreds of
    steps (1.8 times the memory after 60 steps in full).
    """
    malloc.set_parameters({malloc.MMAP_THRESHOLD: LARGEST_KEPT, malloc.TRIM_THRESHOLD: -1})
