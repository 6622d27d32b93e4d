"""Enlarge a model's embedding and head while streaming its tensors, with one block of rows in memory.

Unused rows of the base (Qwen and BLOOM pad their matrices) are filled first, and no old row moves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tongwen.core.errors import ModelError
from tongwen.core.i18n import _
from tongwen.core.safetensors_io import (
    SHARD_BYTES,
    TensorLocation,
    TensorSource,
    blocks,
    copy_bytes,
    plan_shards,
    row_bytes,
    row_count,
)
from tongwen.model.adapters.read import EMBEDDINGS, HEADS
from tongwen.model.loading.fingerprint import digest_of
from tongwen.model.loading.tensors import Array, FileTensors, TorchTensors, from_fp32, is_finite

MakeRows = Callable[[str], Iterator[Array]]  # tensor's name -> blocks of its new rows, in fp32


@dataclass(frozen=True)
class RowPlan:
    """old: number of tokens of the base; new: ids of the new tokens, all from `old` on; held: rows of the base's
    matrices; wanted: rows of the new matrices."""

    old: int
    new: range
    held: int
    wanted: int

    @property
    def filled(self) -> int:
        """Number of new tokens that use a spare row of the base."""
        return max(0, min(self.new.stop, self.held) - self.new.start)

    @property
    def added(self) -> int:
        return self.wanted - self.held

    @property
    def padding(self) -> int:
        """Number of new rows without a token."""
        return max(0, self.wanted - max(self.new.stop, self.held))


def plan_rows(old: int, new: range, held: int, multiple: int, *, shrink: bool = False) -> RowPlan:
    """Plan the number of rows: one for every token, rounded up to a multiple; fewer than before only with `shrink`.

    Raises ModelError when the base's tokenizer has tokens for which its matrices have no row.
    """
    if old > held:
        raise ModelError(
            _("the tokenizer has {old:,} tokens, but the embedding has only {held:,} rows: they do not match").format(
                old=old, held=held
            ),
            place="base",
            remedy=_("use this model's own tokenizer"),
        )
    needed = -(-max(new.stop, old) // multiple) * multiple
    return RowPlan(old, new, held, needed if shrink else max(held, needed) if new.stop > held else held)


def matrices_of(base: TensorSource, place: str) -> list[str]:
    """Return the names of the input embedding and, if stored, of the head. Raises ModelError without an embedding."""
    names = [name for name in base.facts if name.endswith((*EMBEDDINGS, *HEADS))]
    if not any(name.endswith(EMBEDDINGS) for name in names):
        raise ModelError(
            _("this model has no embedding tensor with a known name"),
            place=place,
            remedy=_("known names end with {embeddings}").format(embeddings=_(", ").join(EMBEDDINGS)),
        )
    return sorted(names, key=lambda name: name.endswith(HEADS))


def bytes_needed(base: TensorSource, names: Sequence[str], rows: RowPlan) -> int:
    """Return the bytes of the enlarged model's files."""
    held = sum(row_bytes(*fact) * row_count(fact[1]) for fact in base.facts.values())
    return held + sum(row_bytes(*base.facts[name]) * rows.added for name in names)


def resize_vocabulary(
    base: TensorSource,
    base_digests: Mapping[str, str],
    names: Sequence[str],
    rows: RowPlan,
    make: MakeRows,
    out: Path,
    progress: Callable[[int], None],
    replaced: Mapping[str, Mapping[int, Array]] | None = None,
) -> dict[str, str]:
    """Write the enlarged model to `out` as safetensors; returns the lines of its fingerprint.

    base_lines: the base's known lines, so that copied tensors need not be hashed again
    names:      the tensors that get the rows; a head's bias (one number per row) grows by zeros
    make:       returns the rows of the new tokens in order, then those of the padding
    replaced:   name -> {id: row in fp32} of old rows that change
    """
    grown = {*names, *(_bias_of(name) for name in names if _bias_of(name) in base.facts)}
    facts = {
        name: (dtype, (rows.wanted, *shape[1:]) if name in grown else shape)
        for name, (dtype, shape) in base.facts.items()
    }
    planned = plan_shards(out, facts, SHARD_BYTES)
    for done, (name, place) in enumerate(planned.items(), 1):
        held = min(row_count(base.facts[name][1]), row_count(place.shape))
        _copy_rows(base, name, held, place)
        if name in names:
            _write_rows(name, rows, make(name), place)
            _replace_rows((replaced or {}).get(name, {}), place)
        progress(done)
    return {
        name: base_digests[name] if name in base_digests and name not in grown else digest_of(place)
        for name, place in planned.items()
    }


def with_separate_head(base: TensorSource, name: str, embedding: str) -> TensorSource:
    """Return the tensors with a head of its own under this name: a copy of the embedding."""
    if isinstance(base, FileTensors):
        return FileTensors({**base.stored, name: base.stored[embedding]})
    assert isinstance(base, TorchTensors)
    return TorchTensors({**base.state, name: base.state[embedding]})


def widen_in_memory(
    model: Any,
    rows: RowPlan,
    make: Callable[[bool, Callable[[int, int], Array]], Iterator[Array]],
    *,
    untie: bool = False,
    replaced: Mapping[int, Array] | None = None,
) -> None:
    """Like `resize_vocabulary`, for a model in memory.

    make:     takes whether a matrix is the head alone, and a reader of its rows; returns its new rows
    untie:    give a head that is the embedding a matrix of its own
    replaced: {id: row in fp32} of old rows of the head that change
    """
    import torch

    model.resize_token_embeddings(rows.wanted, mean_resizing=False)
    inside, head = model.get_input_embeddings(), model.get_output_embeddings()
    if untie:
        head.weight = torch.nn.Parameter(inside.weight.detach().clone(), requires_grad=False)
    for weight in {id(part.weight): part.weight for part in (inside, head)}.values():
        held, at = weight.detach().clone(), rows.new.start
        is_head = weight is not inside.weight
        with torch.no_grad():
            for block in make(is_head, lambda begin, end, held=held: held[begin:end].float().numpy()):  # type: ignore[misc]
                if at == rows.new.stop:
                    at = max(at, rows.held)
                weight[at : at + len(block)] = torch.from_numpy(block).to(weight.dtype)
                at += len(block)
            for index, row in (replaced or {}).items() if is_head else ():
                weight[index] = torch.from_numpy(row).to(weight.dtype)


def _bias_of(name: str) -> str:
    return name.removesuffix("weight") + "bias" if name.endswith(HEADS) else ""


def _copy_rows(base: TensorSource, name: str, count: int, place: TensorLocation) -> None:
    size = row_bytes(place.dtype, place.shape) * count
    if isinstance(base, FileTensors):
        one = base.stored[name]
        copy_bytes(replace(one, end=one.begin + size), replace(place, end=place.begin + size))
        return
    with place.file.open("r+b") as stream:
        stream.seek(place.begin)
        for begin, end in blocks((count, *place.shape[1:])):
            stream.write(memoryview(base.raw(name, begin, end)))


def _write_rows(name: str, rows: RowPlan, new: Iterator[Array], place: TensorLocation) -> None:
    """Write new rows at their ids, then the padding. Raises ModelError on NaN or Inf."""
    size, at = row_bytes(place.dtype, place.shape), rows.new.start
    with place.file.open("r+b") as stream:
        for block in new:
            if not is_finite(block):
                raise ModelError(_("a new row contains NaN or Inf"), place=name)
            if at == rows.new.stop:  # spare rows of the base after the last token stay unchanged
                at = max(at, rows.held)
            stream.seek(place.begin + at * size)
            stream.write(memoryview(from_fp32(block, place.dtype)))
            at += len(block)
    assert at >= rows.new.stop and (at == rows.wanted or not rows.padding)


def _replace_rows(replaced: Mapping[int, Array], place: TensorLocation) -> None:
    """Write old rows that change. Raises ModelError on NaN or Inf."""
    size = row_bytes(place.dtype, place.shape)
    with place.file.open("r+b") as stream:
        for index, row in replaced.items():
            if not is_finite(row):
                raise ModelError(_("a new row contains NaN or Inf"), place=place.name)
            stream.seek(place.begin + index * size)
            stream.write(memoryview(from_fp32(row, place.dtype)))
