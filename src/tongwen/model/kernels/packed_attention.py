"""Attention over a pack of documents, in which each document attends only to itself.

`cu_seq_lens_q` (D + 1,) gives the document boundaries, as for flash attention. Where flash attention works (CUDA, 16
bits), one call of torch's `varlen_attn` computes all documents without synchronising with the GPU. Elsewhere each
document is one causal call of torch's scaled-dot-product attention, without a mask of the whole pack. On a CPU that is
four times faster than the dense block mask, and one document cannot see another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from tongwen.model.kernels.short_attention import ShortAttention

NAME = "tongwen_documents"
SHORT = 512  # tokens; in longer documents the cost per pair of tokens outweighs the faster backward
HALVES = (torch.bfloat16, torch.float16)
AMPERE = (8, 0)  # the first GPUs that flash attention supports
WIDEST_HEAD = 256
# What transformers hands through to every attention function, and what the borders of the documents say already.
PASSED_THROUGH = {"position_ids", "cu_seq_lens_k", "max_length_k", "cache_position", "seq_idx", "logits_to_keep"}
# From torch 2.12 on, grouped heads need a flag; before, the kernel detects them.
GROUPED = {"enable_gqa": True} if torch.__version__ >= (2, 12) else {}


class UnknownArgument(RuntimeError):
    """An architecture gives its attention an argument that `documents_attention` does not know, such as sinks."""


def documents_attention(
    module: torch.nn.Module,
    query: torch.Tensor,  # (1, heads, T, head_dim)
    key: torch.Tensor,  # (1, kv_heads, T, head_dim)
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    cu_seq_lens_q: torch.Tensor | None = None,
    max_length_q: int | None = None,
    prefix_lengths: torch.Tensor | None = None,
    sliding_window: int | None = None,
    loop: Callable[..., torch.Tensor] | None = None,
    **extra: Any,
) -> tuple[torch.Tensor, None]:
    """Return the attention output (1, T, heads, head_dim).

    max_length_q:   tokens of the longest document
    prefix_lengths: (D,) tokens at each document's start that all its tokens see
    loop:           replaces `_one_by_one`
    Raises RuntimeError without boundaries, and UnknownArgument for one that may change the scores.
    """
    if cu_seq_lens_q is None:
        raise RuntimeError("documents_attention needs cu_seq_lens_q; for generation use attn_implementation='sdpa'")
    if extra.pop("is_causal", True) is False and prefix_lengths is None:
        raise UnknownArgument("is_causal")
    _check_known(extra | {"attention_mask": attention_mask})
    computed_in = _computed_in(query)
    if max_length_q and prefix_lengths is None and not dropout and _suits_flash(query, value, computed_in):
        query, key, value = (part.to(computed_in) for part in (query, key, value))
        return _all_at_once(query, key, value, cu_seq_lens_q, max_length_q, scaling, sliding_window), None
    out = (loop or _one_by_one)(query, key, value, cu_seq_lens_q, prefix_lengths, scaling, dropout, sliding_window)
    return out.transpose(1, 2).contiguous(), None  # as transformers' own functions do: some models take a view of it


def _check_known(extra: dict[str, Any]) -> None:
    """Raise UnknownArgument for a tensor or number that is not known: it may change the scores."""
    for name, value in extra.items():
        if isinstance(value, (torch.Tensor, float, int)) and not isinstance(value, bool) and name not in PASSED_THROUGH:
            raise UnknownArgument(name)


def _one_by_one(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    borders: torch.Tensor,
    prefix_lengths: torch.Tensor | None,
    scaling: float | None,
    dropout: float,
    sliding_window: int | None,
) -> torch.Tensor:
    """Return the attention output (1, heads, T, head_dim), with one call for each document."""
    lengths = borders.diff().tolist()
    grouped = query.shape[1] != key.shape[1]
    prefixes = prefix_lengths.tolist() if prefix_lengths is not None else [0] * len(lengths)
    parts = []
    # Split instead of slicing: the backward of a slice writes and adds zeros for the whole pack, for each document.
    documents = zip(*(part.split(lengths, dim=2) for part in (query, key, value)), strict=True)
    for length, prefix, (queries, keys, values) in zip(lengths, prefixes, documents, strict=True):
        window = sliding_window if sliding_window and length > sliding_window else None
        mask = _band(length, window, prefix, query.device) if window or prefix else None
        if mask is None and not dropout and length <= SHORT and _is_bf16_on_cpu(queries, values):
            parts.append(ShortAttention.apply(queries, keys, values, scaling or queries.shape[-1] ** -0.5))
            continue
        parts.append(
            scaled_dot_product_attention(
                queries,
                keys,
                values,
                attn_mask=mask,
                dropout_p=dropout,
                is_causal=mask is None,
                scale=scaling,
                enable_gqa=grouped,
            )
        )
    return torch.cat(parts, dim=2)


def _is_bf16_on_cpu(query: torch.Tensor, value: torch.Tensor) -> bool:
    """Whether `ShortAttention` supports these: bf16 on a CPU, with queries and values of one head width."""
    suits: bool = query.dtype == torch.bfloat16 and query.device.type == "cpu"
    return suits and query.shape[-1] == value.shape[-1]


def register() -> str:
    """Register the function with transformers; returns the name for `attn_implementation`."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, documents_attention)
    return NAME


def name_in_use(model: Any) -> str:
    """Return transformers' name of the attention that the text part of a model uses."""
    return str(model.config.get_text_config()._attn_implementation)


def use(model: Any) -> None:
    """Let the text part of a model attend within documents. A tower keeps its own attention."""
    _set(model, register())


def restore(model: Any, name: str) -> None:
    """Let the text part of a model use the attention of this name again."""
    if name_in_use(model) != name:
        _set(model, name)


@contextmanager
def own_attention(model: Any, name: str) -> Iterator[None]:
    """Let a model that packs use the attention of this name in the block."""
    restore(model, name)
    try:
        yield
    finally:
        use(model)


def _set(model: Any, name: str) -> None:
    config = model.config
    text = config.get_text_config()
    part = next((key for key in config.sub_configs if getattr(config, key, None) is text), "")
    model.set_attn_implementation({part: name} if part else name)


def leave_out_of_graphs() -> None:
    """Exclude the loop over documents from compiled graphs: each pack would need its own. Flash attention stays in."""
    from transformers import AttentionInterface

    loop = torch.compiler.disable(_one_by_one)
    AttentionInterface.register(NAME, partial(documents_attention, loop=loop))


def _computed_in(query: torch.Tensor) -> torch.dtype:
    """Return the dtype for attention. Under autocast, rotary positions may have left a query in fp32."""
    kind = query.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else query.dtype


def _suits_flash(query: torch.Tensor, value: torch.Tensor, computed_in: torch.dtype) -> bool:
    """Whether torch's flash attention supports these heads on this device."""
    width = query.shape[-1]
    return (
        query.is_cuda
        and torch.version.hip is None
        and computed_in in HALVES
        and width == value.shape[-1] <= WIDEST_HEAD
        and width % 8 == 0
        and torch.cuda.get_device_capability(query.device) >= AMPERE
    )


def _all_at_once(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    borders: torch.Tensor,
    longest: int,
    scaling: float | None,
    window: int | None,
) -> torch.Tensor:
    """Return the output (1, T, heads, head_dim) of all documents by one call.

    flash attention's window counts the tokens before the current one.
    """
    from torch.nn.attention.varlen import varlen_attn  # this import takes seconds, so not on a CPU

    flat = (part[0].transpose(0, 1) for part in (query, key, value))  # (T, heads, head_dim)
    seen = (window - 1 if window and window < longest else -1, 0)
    out: torch.Tensor = varlen_attn(
        *flat, borders, borders, longest, longest, scale=scaling, window_size=seen, **GROUPED
    )
    return out[None]


def _band(length: int, window: int | None, prefix: int, device: torch.device) -> torch.Tensor:
    """Return a mask (length, length): each token sees itself, the window - 1 tokens before it (all without a window),
    and the prefix."""
    seen = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    if window:
        seen = seen.triu(1 - window)
    seen[:, :prefix] = True
    return seen
