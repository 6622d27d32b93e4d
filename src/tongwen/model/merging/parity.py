"""Compare the logits of base + adapters with the merged model's on fixed ids, with one block of a matrix in memory.

The two sides are computed in different ways: the adapters act on the activations, x Wᵀ + s (x Aᵀ) Bᵀ, while the merged
matrix is read back from its file. The forward pass is that of the Llama-like families, in fp32, without RoPE scaling,
which would affect both sides equally. Use `--parity full` for other families.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from tongwen.core.errors import ModelError, NumbersError, first_line
from tongwen.core.i18n import _
from tongwen.core.model_families import family_of
from tongwen.core.safetensors_io import TensorSource, blocks
from tongwen.model.loading.tensors import Array, FileTensors, read_fp32
from tongwen.model.merging.combine import CombinedChange
from tongwen.model.merging.merge import ChangeStep, MergeResult, MergeTarget, base_rows, steps_of

TOKENS = 12
# Largest change of the logits by rounding, as a share of their spread; a wrong matrix changes them by tens of percent.
LIMITS = {"F64": 1e-3, "F32": 1e-3, "F16": 2e-2, "BF16": 1e-1}


class MergedWeights:
    """The merged model's tensors, read from its files."""

    def __init__(self, tensors: TensorSource) -> None:
        self.tensors = tensors

    def has(self, name: str) -> bool:
        return name in self.tensors.facts

    def rows(self, name: str, ids: Sequence[int]) -> Array:
        return np.concatenate([read_fp32(self.tensors, name, index, index + 1) for index in ids])

    def vector(self, name: str) -> Array:
        return read_fp32(self.tensors, name)

    def product(self, name: str, x: Array) -> Array:
        """Return x Wᵀ. x: (T, in) -> (T, out)."""
        return np.concatenate(
            [x @ read_fp32(self.tensors, name, *rows).T for rows in blocks(self.tensors.facts[name][1])], axis=1
        )


class LiveWeights:
    """The base's tensors with unmerged adapters."""

    def __init__(self, base: TensorSource, targets: Sequence[MergeTarget]) -> None:
        self.base, self.targets = base, {target.name: target for target in targets}

    def has(self, name: str) -> bool:
        return name in self.targets

    def rows(self, name: str, ids: Sequence[int]) -> Array:
        target = self.targets[name]
        steps = steps_of(target)
        return np.concatenate([self._weights(target, steps, index, index + 1) for index in ids])

    def vector(self, name: str) -> Array:
        target = self.targets[name]
        return self._weights(target, steps_of(target), 0, target.shape[0])

    def product(self, name: str, x: Array) -> Array:
        """Return the output of the layer with its adapters. x: (T, in) -> (T, out)."""
        target = self.targets[name]
        steps = steps_of(target)
        products = [step for step in steps if isinstance(step, ChangeStep) and step.additive]
        if len(products) < len(steps):
            rows = blocks(target.shape)
            return np.concatenate([x @ self._weights(target, steps, *block).T for block in rows], axis=1)
        return self._summed(target, products, x)

    def _summed(self, target: MergeTarget, steps: Sequence[ChangeStep], x: Array) -> Array:
        """Apply the base and each adapter to the activations, and sum."""
        low = [x @ step.pair[1].T * step.change.scale if step.pair else None for step in steps]  # (T, r) each
        out = []
        for begin, end in blocks(target.shape):
            whole = [step for step in steps if "whole" in step.change.parts]
            y = (
                x @ self._weights(target, [], begin, end).T
                if not whole
                else np.zeros((len(x), end - begin), np.float32)
            )
            for step, narrow in zip(steps, low, strict=True):
                if step in whole:
                    y = x @ read_fp32(step.change.source, step.change.parts["whole"], begin, end).T
                if step.pair is not None and narrow is not None:
                    y = y + narrow @ step.pair[0][begin:end].T
            out.append(y)
        return np.concatenate(out, axis=1)

    def _weights(
        self, target: MergeTarget, steps: Sequence[ChangeStep | CombinedChange], begin: int, end: int
    ) -> Array:
        block = base_rows(self.base, target, begin, end)
        for step in steps:
            block = step.apply(block, begin, end)
        return block


def compare_logits(base: TensorSource, result: MergeResult, config: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the differences of the logits (see `measure`); None for a family that this forward pass does not support.

    Raises NumbersError when the two differ by more than rounding explains.
    """
    sides = logits_of_both(base, result, config)
    return sides and check_difference(*sides, limit_of(result))


def logits_of_both(base: TensorSource, result: MergeResult, config: Mapping[str, Any]) -> tuple[Array, Array] | None:
    """Return the logits of (base + adapters, merged model), (T, V) each; None for an unsupported family."""
    family = family_of(str(config.get("model_type")))
    if family is None or not family.like_llama:
        return None
    sides = (LiveWeights(base, result.targets), MergedWeights(FileTensors(result.stored)))
    try:
        ids = fixed_ids(int(config["vocab_size"]))
        with ThreadPoolExecutor(2) as pool:
            live, merged = pool.map(lambda side: logits(side, config, ids), sides)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, ArithmeticError) as error:
        raise ModelError(
            _("config.json does not fit the weights: {reason}").format(
                reason=f"{type(error).__name__}: {first_line(error)[:160]}"
            ),
            place=str(config.get("_name_or_path") or config.get("model_type")),
            remedy=_("use the config.json that belongs to these weights"),
        ) from error
    return live, merged


def fixed_ids(vocabulary: int, count: int = TOKENS) -> list[int]:
    """Return the same few ids every time, spread over the vocabulary."""
    return [(7 + 997 * index) % vocabulary for index in range(count)]


def limit_of(result: MergeResult) -> float:
    return max((LIMITS[target.dtype] for target in result.targets if target.changes), default=LIMITS["F32"])


def check_difference(live: Array, merged: Array, limit: float) -> dict[str, Any]:
    """Return how two logits (T, V) differ. Raises NumbersError if by more than `limit`, a share of their spread."""
    found = measure(live, merged)
    if not found["relative"] <= limit:
        raise NumbersError(
            _(
                "the merged model's logits differ from base + adapters by {relative:.2%} of their spread; rounding explains only {limit:.1%}"
            ).format(relative=found["relative"], limit=limit),
            place="parity",
            remedy=_("keep more digits: --dtype fp32") if limit > LIMITS["F32"] else "",
        )
    return found


def measure(live: Array, merged: Array) -> dict[str, Any]:
    """Measure how two logits (T, V) differ. relative: RMS as a share of the spread. Raises NumbersError on NaN."""
    if not (np.isfinite(live).all() and np.isfinite(merged).all()):
        raise NumbersError(_("the logits contain NaN or Inf"), place="parity")
    apart = np.abs(live - merged)
    return {
        "tokens": len(live),
        "max_logit_difference": float(apart.max()),
        "mean_logit_difference": float(apart.mean()),
        "relative": float(np.sqrt(np.mean(apart**2)) / max(float(live.std()), 1e-9)),
        "same_best": float(np.mean(live.argmax(-1) == merged.argmax(-1))),
    }


def logits(weights: MergedWeights | LiveWeights, config: Mapping[str, Any], ids: Sequence[int]) -> Array:
    """Return the logits (T, V) of one sequence of ids."""
    heads, groups = (
        int(config["num_attention_heads"]),
        int(config.get("num_key_value_heads") or config["num_attention_heads"]),
    )
    width = int(config.get("head_dim") or int(config["hidden_size"]) // heads)
    epsilon = float(config["rms_norm_eps"])
    x = weights.rows("model.embed_tokens.weight", ids)
    turn = _rotation(len(ids), width, config)
    future = np.triu(np.full((len(ids), len(ids)), -np.inf, np.float32), 1)

    def norm(x: Array, name: str) -> Array:
        return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + epsilon) * weights.vector(f"{name}.weight")

    def linear(x: Array, name: str) -> Array:
        out = weights.product(f"{name}.weight", x)
        return out + weights.vector(f"{name}.bias") if weights.has(f"{name}.bias") else out

    def split(x: Array, name: str, count: int) -> Array:  # (T, count * width) -> (count, T, width)
        x = linear(x, f"{name}_proj").reshape(len(ids), count, width)
        if weights.has(f"{name}_norm.weight"):
            x = norm(x, f"{name}_norm")
        return x.transpose(1, 0, 2)

    for layer in range(int(config["num_hidden_layers"])):
        at = f"model.layers.{layer}"
        inside = norm(x, f"{at}.input_layernorm")
        q, k = (
            _turned(split(inside, f"{at}.self_attn.q", heads), turn),
            _turned(split(inside, f"{at}.self_attn.k", groups), turn),
        )
        v = split(inside, f"{at}.self_attn.v", groups)
        k, v = (np.repeat(part, heads // groups, axis=0) for part in (k, v))
        scores = q @ k.transpose(0, 2, 1) / np.float32(np.sqrt(width)) + future
        scores = np.exp(scores - scores.max(-1, keepdims=True))
        mixed = (scores / scores.sum(-1, keepdims=True)) @ v
        x = x + linear(mixed.transpose(1, 0, 2).reshape(len(ids), heads * width), f"{at}.self_attn.o_proj")
        inside = norm(x, f"{at}.post_attention_layernorm")
        gate = linear(inside, f"{at}.mlp.gate_proj")
        x = x + linear(gate / (1 + np.exp(-gate)) * linear(inside, f"{at}.mlp.up_proj"), f"{at}.mlp.down_proj")
    head = "lm_head" if weights.has("lm_head.weight") else "model.embed_tokens"
    return linear(norm(x, "model.norm"), head)


def _rotation(length: int, width: int, config: Mapping[str, Any]) -> tuple[Array, Array]:
    theta = config.get("rope_theta") or (config.get("rope_parameters") or {}).get("rope_theta") or 10000.0
    angles = np.outer(np.arange(length), float(theta) ** (-np.arange(0, width, 2) / width))
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


def _turned(x: Array, turn: tuple[Array, Array]) -> Array:
    """Apply rotary positions to halves, as transformers does. x: (heads, T, width)."""
    cos, sin = turn
    one, other = np.split(x, 2, axis=-1)
    return np.concatenate([one * cos - other * sin, other * cos + one * sin], axis=-1)
