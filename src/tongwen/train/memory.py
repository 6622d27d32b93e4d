"""What a run will need, before it needs it: peak memory and disk, from shapes alone; and how a CPU run keeps memory."""

from __future__ import annotations

import ctypes
import sys
from dataclasses import dataclass

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # malloc.h


@dataclass(frozen=True)
class Shape:
    """parameters: all; trainable: those with a gradient; the rest are the model's widths."""

    parameters: int
    trainable: int
    layers: int
    hidden: int
    intermediate: int
    vocabulary: int


# A block of 64 weights has a scale of one byte beside it; those scales have a scale for each 256 of them.
QUANTIZED = {"nf4": 0.5 + 1 / 64 + 4 / (64 * 256), "int8": 1.0}


def estimate(
    shape: Shape,
    *,
    tokens: int,
    learned_share: float,
    bytes_per_weight: int,
    full: bool,
    checkpointing: bool,
    quantize: str = "",
) -> dict[str, int]:
    """Bytes by purpose for a micro-batch of that many tokens, and their sum `peak`.

    Kept per token and layer for the backward: the inputs of each matrix and norm, and of SwiGLU's product (about
    13 x hidden + 4 x intermediate numbers); an adapter adds nothing of that size. Adam keeps two fp32 moments.
    """
    held = 4 if full else bytes_per_weight
    weights = shape.parameters * held + (0 if full else shape.trainable * 4)
    if quantize:  # the matrices of the layers are; embeddings and what learns are not
        matrices = shape.parameters - shape.trainable - shape.vocabulary * shape.hidden
        weights -= int(matrices * (held - QUANTIZED[quantize]))
    gradients = shape.trainable * 4
    per_layer = 13 * shape.hidden + 4 * shape.intermediate
    kept = (shape.hidden * shape.layers + per_layer) if checkpointing else per_layer * shape.layers
    activations = tokens * kept * bytes_per_weight
    head = int(tokens * learned_share) * shape.vocabulary * (4 + (0 if bytes_per_weight == 4 else 2))
    parts = {
        "weights": weights,
        "gradients": gradients,
        "optimizer": 8 * shape.trainable,
        "activations": activations,
        "head": head,
    }
    return {**parts, "peak": sum(parts.values())}


def flops_per_token(shape: Shape, learned_share: float, *, full: bool) -> float:
    """Multiply-adds count two: 6 per weight in full, 4 with an adapter (no gradient of frozen weights)."""
    embedding = shape.vocabulary * shape.hidden
    layers = max(shape.parameters - shape.trainable * (not full) - embedding, 1)
    return (6 if full else 4) * (layers + learned_share * embedding)


def keep_freed_memory() -> None:
    """Let glibc's allocator reuse what this process frees; elsewhere nothing is changed.

    By default each large tensor is a mapping of its own, which the kernel clears page by page when it is first written
    and takes back when it is freed: of a training step on a CPU that is 3 to 10 % of the time.
    """
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, -1)
