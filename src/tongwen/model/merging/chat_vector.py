"""Chat vectors: add the difference between an instruct model and its base to another model trained from that base.

Computes W + s (instruct - base) tensor by tensor in fp32, with one block of rows in memory, and rounds once (Huang et
al. 2023, arXiv:2310.04799: gives a Chinese base chat abilities without Chinese instructions). Rows that an extended
vocabulary added have no counterpart and stay unchanged.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from tongwen.core.errors import ArtifactError, ModelError, NumbersError
from tongwen.core.i18n import _
from tongwen.core.safetensors_io import SHARD_BYTES, TensorLocation, TensorSource, blocks, plan_shards, row_count
from tongwen.model.adapters.read import EMBEDDINGS, HEADS
from tongwen.model.loading.fingerprint import digest_of, start_digest
from tongwen.model.loading.tensors import FLOATS, from_fp32, is_finite, read_fp32


@dataclass
class ChatVectorResult:
    """lines: tensor -> its line of the fingerprint; changed: number of tensors that changed; kept: number of rows of an
    extended vocabulary that did not."""

    lines: dict[str, str] = field(default_factory=dict)
    changed: int = 0
    kept: int = 0


def check_alike(target: TensorSource, instruct: TensorSource, base: TensorSource) -> None:
    """Raise ArtifactError unless all three have the same tensors; the target's vocabulary may be larger."""
    for name in sorted(base.facts.keys() | instruct.facts.keys() | target.facts.keys()):
        shapes = [tensors.facts[name][1] if name in tensors.facts else None for tensors in (target, instruct, base)]
        ours, theirs, old = shapes
        grown = name.endswith((*EMBEDDINGS, *HEADS)) and ours and theirs and ours[0] > theirs[0]
        if theirs != old or (ours != theirs and not (grown and ours and theirs and ours[1:] == theirs[1:])):
            raise ArtifactError(
                _(
                    "the three models belong to different families: {name} has the shapes {ours}, {theirs} and {old}"
                ).format(name=name, ours=ours, theirs=theirs, old=old),
                place="--chat-vector",
                remedy=_("give an instruct model, and the base that both models share"),
            )


def add_chat_vector(
    target: TensorSource,
    instruct: TensorSource,
    base: TensorSource,
    scale: float,
    out: Path,
    progress: Callable[[int], None],
) -> ChatVectorResult:
    """Write target + scale x (instruct - base) to `out` as safetensors and read it back.

    Raises NumbersError on NaN or Inf and when the data read back differ from those written, ArtifactError when
    instruct and base are equal.
    """
    planned, added = plan_shards(out, target.facts, SHARD_BYTES), ChatVectorResult()
    for done, place in enumerate(planned.values(), 1):
        _add_one(target, instruct, base, scale, place, added)
        progress(done)
    if not added.changed:
        raise ArtifactError(
            _("instruct model and base are the same: there is no difference to add"),
            place="--chat-vector",
        )
    for name, place in planned.items():
        if digest_of(place) != added.lines[name]:
            raise NumbersError(
                _("read back from the file, it differs from what was written"),
                place=name,
                remedy=_("the disk or the memory may be failing; try again"),
            )
    return added


def _add_one(
    target: TensorSource,
    instruct: TensorSource,
    base: TensorSource,
    scale: float,
    place: TensorLocation,
    added: ChatVectorResult,
) -> None:
    name, differs = place.name, False
    if place.dtype not in FLOATS:
        raise ModelError(
            _("its dtype is {dtype}: a quantised model").format(dtype=place.dtype),
            place=name,
        )
    shared = row_count(instruct.facts[name][1])
    added.kept += row_count(place.shape) - shared
    digest = start_digest(name, place.dtype, place.shape)
    with place.file.open("r+b") as stream:
        stream.seek(place.begin)
        for begin, end in blocks(place.shape):
            rows = read_fp32(target, name, begin, end)
            last = min(end, shared)
            if begin < last:
                change = read_fp32(instruct, name, begin, last) - read_fp32(base, name, begin, last)
                differs = differs or bool(change.any())
                rows[: last - begin] += scale * change
            if not is_finite(rows):
                raise NumbersError(_("the result contains NaN or Inf"), place=name)
            new = from_fp32(rows, place.dtype)
            digest.update(new)
            stream.write(memoryview(new))
    added.lines[name] = str(digest.hexdigest())
    added.changed += differs
