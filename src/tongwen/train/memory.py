"""Facts about memory and arithmetic that a plan reckons with; and how a CPU run keeps memory."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from tongwen.core import distributed, malloc
from tongwen.recipe.training import Training

LARGEST_KEPT = 32 << 20  # bytes; more glibc does not take for the threshold


@dataclass(frozen=True)
class ModelShape:
    """parameters: all; trainable: those with a gradient; of_layer: those of the largest layer; outside: those of no layer; the
    rest are the model's widths."""

    parameters: int
    trainable: int
    layers: int
    hidden: int
    intermediate: int
    vocabulary: int
    of_layer: int = 0
    outside: int = 0


# A block of 64 weights has a scale of one byte beside it; those scales have a scale for each 256 of them.
QUANTIZED = {"nf4": 0.5 + 1 / 64 + 4 / (64 * 256), "int8": 1.0}
STATE_BYTES = {"adamw": 8, "adamw_8bit": 2, "paged_adamw_8bit": 2, "adafactor": 0, "muon": 4}  # for each parameter
STREAMED = 100_000_000  # bytes that merging and exporting take at any size of model (bench/results/merge.json)
CUDA_CONTEXT = 600_000_000  # bytes of a GPU that CUDA and its libraries take before the first tensor, about

MOST_TOKENS = 65536  # at once: the launches of any model are hidden then

# What each process has only its part of. ZeRO counts up: the optimizer, then the gradients, then the weights.
SHARED = {
    "zero1": ("optimizer",),
    "zero2": ("gradients", "optimizer"),
    "zero3": ("weights", "gradients", "optimizer"),
    "fsdp2": ("weights", "gradients", "optimizer"),
}


@dataclass(frozen=True)
class Sharing:
    """How an engine divides a training among processes, each with a GPU of its own.

    engine:    "" for one process, ddp, zero1 to zero3, or fsdp2
    offloaded: purposes that wait in the host's memory
    reshard:   fsdp2: whether a layer's weights are given back between forward and backward
    bucket:    DeepSpeed: numbers of the buffers that gradients are collected in
    """

    engine: str = ""
    world: int = 1
    offloaded: tuple[str, ...] = ()
    reshard: bool = True
    bucket: int = 0

    @property
    def is_whole(self) -> bool:
        """Whether every process has the whole model where it was put, as `Engine.is_whole` says of a run."""
        return self.engine in ("", "ddp")

    def of(self, needs: dict[str, int], shape: ModelShape, width: int, frozen_width: float) -> dict[str, int]:
        """Bytes of one process by purpose, from those of a process alone. width: bytes of a number that is computed with;
        frozen_width: of one of a layer's weights, which may be quantised.

        DDP collects gradients in buckets, which are a second copy of them. DeepSpeed in 16 bits keeps what learns in 16 and
        its fp32 original with the optimizer; its gradients have 16 bits. Whoever shares the weights out makes two layers
        whole at a time, the one that is computed and the next, and what belongs to no layer (embedding, head) all along.
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
        shared = SHARED.get(self.engine, ())
        for purpose in shared:
            out[purpose] = -(-out[purpose] // self.world)
        if "weights" in shared:
            layers = 2 * shape.of_layer if self.reshard else shape.of_layer * shape.layers
            learning = shape.trainable // shape.layers  # of a layer: its whole gradient, before it is summed in fp32
            whole = width * shape.outside + int(frozen_width * layers) + (width + 4) * learning
            out["gathered"] = out.get("gathered", 0) + whole
        return {purpose: 0 if purpose in self.offloaded else size for purpose, size in out.items()}


ALONE = Sharing()


def kept_for_backward(shape: ModelShape, *, checkpointing: bool) -> int:
    """Numbers per token: the inputs of each matrix and norm, and of SwiGLU's product; an adapter adds nothing of that
    size."""
    per_layer = 13 * shape.hidden + 4 * shape.intermediate
    return shape.hidden * shape.layers + per_layer if checkpointing else per_layer * shape.layers


def rough_shape(config: Any) -> ModelShape:
    """Of a Llama of the configuration's widths, all of which learns, without its biases and norms."""
    text = config.get_text_config()
    hidden, inner = text.hidden_size, getattr(text, "intermediate_size", None) or 4 * text.hidden_size
    numbers = text.num_hidden_layers * (4 * hidden + 3 * inner) * hidden + text.vocab_size * hidden
    return ModelShape(numbers, numbers, text.num_hidden_layers, hidden, inner, text.vocab_size)


def token_budget(device: str, config: Any, memory: int = 0, *, full: bool = False) -> int:
    """Tokens that go through the model at once when the recipe does not say. memory: bytes of the GPU, if that is known; full:
    whether all weights learn.

    On a CPU that multiplies fast, small packs spend their time between the products (2.49 CPU-ms per token with 2048, 2.38
    with 4096, SmolLM2-135M in bf16 with packs of 900 and 1,800 tokens). On a GPU a small model's layers wait for the launches
    of their operations (forward and backward 7.45 ms, for 6,144 tokens of a 1B Llama on an H100): it gets twice as much,
    and again, while what the backward keeps, in 16 bits, takes no more than half of what the weights leave.
    """
    if device == "cpu":
        return 4096
    budget = 8192
    if memory:
        shape = rough_shape(config)
        spare = memory - CUDA_CONTEXT - shape.parameters * (16 if full else 2)
        per_token = 2 * kept_for_backward(shape, checkpointing=False)
        while budget < MOST_TOKENS and 2 * budget * per_token <= spare / 2:
            budget *= 2
    return budget


def device_memory(device: str) -> int:
    """Bytes of this process's GPU, by its own module (cuda, npu, xpu); 0 where there is none, and where it does not tell
    (mps: its memory is the machine's)."""
    ask = getattr(torch.get_device_module(device), "mem_get_info", None)
    return int(ask()[1]) if ask else 0


def own_memory(device: str) -> int:
    """The same of the only process; 0 for several, which must agree on a plan."""
    return device_memory(device) if distributed.world_size() == 1 else 0


def is_reckoned_to_fit(model: Any, words: Training, sharing: Sharing, width: int, tokens: int, memory: int) -> bool:
    """Whether so many tokens at once fit a GPU with all their activations. From what all processes know alike (their GPUs
    are of one kind), so that all answer alike: layers that only some recompute would ask for shared weights in another order, and wait for each other."""
    rough, learning = rough_shape(model.config), sum(part.numel() for part in model.parameters() if part.requires_grad)
    outside = rough.vocabulary * rough.hidden
    shape = replace(rough, trainable=learning, outside=outside, of_layer=(rough.parameters - outside) // rough.layers)
    weights = sum(part.numel() * part.element_size() for part in model.parameters())
    needs = {"weights": weights, "gradients": 4 * learning, "optimizer": STATE_BYTES[words.optimizer] * learning}
    needed = sum(sharing.of(needs, shape, width, width).values())
    if words.sharded_by == "deepspeed":  # which shares out after the audit
        needed = max(needed, needs["weights"] + needs["gradients"])
    activations = tokens * 2 * kept_for_backward(rough, checkpointing=False)
    return bool(CUDA_CONTEXT + needed + activations <= 0.9 * memory)


def flops_per_token(shape: ModelShape, learned_share: float, *, full: bool) -> float:
    """Multiply-adds count two: 6 per weight in full, 4 with an adapter (no gradient of frozen weights)."""
    embedding = shape.vocabulary * shape.hidden
    layers = max(shape.parameters - shape.trainable * (not full) - embedding, 1)
    return (6 if full else 4) * (layers + learned_share * embedding)


def keep_freed_memory() -> None:
    """Let glibc's allocator reuse what this process frees.

    By default each large tensor is a mapping of its own, which the kernel clears page by page when it is first written
    and takes back when it is freed: of a training step on a CPU that is 3 to 10 % of the time. The largest (logits,
    gradients of an embedding) stay mappings: kept, they leave holes that the next pack, a token longer, does not fit into,
    and the process grows for hundreds of steps (1.8 times the memory after 60 steps in full).
    """
    malloc.set_parameters({malloc.MMAP_THRESHOLD: LARGEST_KEPT, malloc.TRIM_THRESHOLD: -1})
