"""Merge adapters into their base while streaming its tensors: W + scale x B A in fp32, rounded once.

Only one block of rows is in memory, whatever the model's size. The kernel copies tensors that no adapter changes.
Nothing is written unless every adapter tensor is used exactly once and every target exists.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tongwen.core.errors import ArtifactError, ModelError, NumbersError
from tongwen.core.i18n import _
from tongwen.core.model_families import family_of
from tongwen.core.safetensors_io import (
    TensorLocation,
    TensorSource,
    blocks,
    copy_bytes,
    plan_shards,
    row_bytes,
    row_count,
)
from tongwen.model.adapters.lineage import highest_token
from tongwen.model.adapters.patterns import check_patterns
from tongwen.model.adapters.read import (
    EMBEDDINGS,
    HEADS,
    Adapter,
    AdapterChange,
    NotOneToOne,
    check_complete,
    same_change,
    same_numbers,
)
from tongwen.model.loading.fingerprint import start_digest
from tongwen.model.loading.names import TensorNames
from tongwen.model.loading.tensors import FLOATS, Array, FileTensors, from_fp32, is_finite, read_fp32, to_fp32
from tongwen.model.merging import combine

ROUNDING = {"F64": 2e-7, "F32": 2e-7, "F16": 2**-11, "BF16": 2**-8}  # relative error of a number, with fp32 noise


@dataclass
class MergeTarget:
    """One tensor of the merged model. source: the base's tensor that it starts from; mix: how to combine the changes of
    independently trained adapters; cuts: for TIES, see `combine`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    source: str | None
    changes: list[AdapterChange] = field(default_factory=list)
    mix: combine.Combination | None = None
    cuts: list[float] = field(default_factory=list)


@dataclass
class MergeResult:
    """The merged files. lines: tensor -> its line of the fingerprint; same: tensors with changes that equal the base's
    to the byte; untrained: tensors with an adapter that is all zero."""

    stored: dict[str, TensorLocation]
    targets: list[MergeTarget]
    lines: dict[str, str] = field(default_factory=dict)
    same: list[str] = field(default_factory=list)
    untrained: list[str] = field(default_factory=list)


class ChangeStep:
    """One adapter's change of one tensor, with its small matrices in memory."""

    def __init__(self, change: AdapterChange) -> None:
        self.change = change
        self.pair = change.low_rank()
        self.magnitude = change.read("magnitude").reshape(-1) if "magnitude" in change.parts else None
        self.bias = change.read("bias") if "bias" in change.parts else None
        self.values = change.read("rows") if "rows" in change.parts else None
        self.is_zero = self.pair is not None and not all(part.any() for part in self.pair)
        self.additive = self.magnitude is None and self.values is None  # only a sum of products
        self.place = change.place

    def apply(self, block: Array, begin: int, end: int) -> Array:
        """Return the changed rows [begin, end), in the block's dtype."""
        change = self.change
        if "whole" in change.parts:
            block = read_fp32(change.source, change.parts["whole"], begin, end).astype(block.dtype, copy=False)
        if self.values is not None:
            for row, value in zip(change.rows, self.values, strict=True):
                if begin <= row < end:
                    block[row - begin] = value
        if self.pair is not None:
            left, right = (part.astype(block.dtype, copy=False) for part in self.pair)
            delta = left[begin:end] @ right
            delta *= change.scale
            block += delta
        if self.magnitude is not None:
            norm = np.sqrt(np.einsum("ij,ij->i", block, block))
            block *= (self.magnitude[begin:end].astype(block.dtype) / norm)[:, None]
        if self.bias is not None:
            block += self.bias[begin:end] * change.scale
        return block


def plan_targets(
    base: TensorSource,
    config: dict[str, Any],
    adapters: Sequence[Adapter],
    dtype: str | None,
    known: Callable[[], Sequence[TensorNames]],
) -> tuple[list[MergeTarget], dict[str, Any], list[str]]:
    """Return (the merged model's tensors in the base's order, its config, notices for the user).

    known: returns the names that this model's tensors have in memory, which may differ from those in the files.
    Raises ArtifactError when an adapter does not fit, NotOneToOne when only peft can map it to the model.
    """
    config, notices = json.loads(json.dumps(config)), []
    targets = targets_of(base, dtype)
    head, embedding = _ending(targets, HEADS), _ending(targets, EMBEDDINGS)
    tied = is_tied(base, config, head, embedding)
    for adapter in adapters:
        if adapter.whole_model:
            raise NotOneToOne(adapter.whole_model)
        changes = _changes_in_file(base, adapter, known)
        if missing := [name for name in changes if name not in targets and not (tied and name.endswith(HEADS))]:
            raise _missing(adapter, missing)
        _find_layout(adapter, config)
        if tied and embedding and _unties(adapter, changes, embedding):
            head = _ending(changes, HEADS) or head or "lm_head.weight"
            targets[head] = _twin(targets[embedding], head)
            tied = False
            untie(config)
            notices.append(
                _(
                    "{folder} trained the embedding and the head separately, so the merged model no longer ties them"
                ).format(folder=adapter.folder)
            )
        for name, change in changes.items():
            _check_fit(targets[name], change)
            targets[name].changes.append(change)
        if tied and head and embedding:  # the file holds both matrices of a tied pair
            targets[head] = _twin(targets[embedding], head)
    _check_rows_of_head(base, targets, adapters[-1].folder)
    if embedding and targets[embedding].shape != base.facts[embedding][1]:
        grow(config, targets[embedding].shape[0])
    return list(targets.values()), config, notices


def targets_of(base: TensorSource, dtype: str | None) -> dict[str, MergeTarget]:
    """Return a target for each tensor of the base, without changes. dtype: for floats, in place of the base's own."""
    return {
        name: MergeTarget(name, dtype if dtype and kind in FLOATS else kind, shape, name)
        for name, (kind, shape) in base.facts.items()
    }


def is_tied(base: TensorSource, config: Mapping[str, Any], head: str | None, embedding: str | None) -> bool:
    """Whether head and embedding are one matrix, as transformers sees it: the config may say so, or leave it to the
    family's default, and two matrices in the file that differ are two."""
    sections = (config, config.get("text_config") or {})
    said = next((section["tie_word_embeddings"] for section in sections if "tie_word_embeddings" in section), True)
    if embedding is None or not said:
        return False
    return head is None or same_numbers(base, embedding, base, head)


def untie(config: dict[str, Any]) -> None:
    """Say in a model's config that head and embedding are two matrices."""
    config["tie_word_embeddings"] = False
    if "tie_word_embeddings" in (config.get("text_config") or {}):
        config["text_config"]["tie_word_embeddings"] = False


def grow(config: dict[str, Any], rows: int) -> None:
    """Say in a model's config how many rows its vocabulary has."""
    (config["text_config"] if config.get("text_config") else config)["vocab_size"] = rows


def _changes_in_file(
    base: TensorSource, adapter: Adapter, known: Callable[[], Sequence[TensorNames]]
) -> dict[str, AdapterChange]:
    """Return an adapter's changes by the names of the base's files; check that the adapter is complete.

    Raises NotOneToOne when the files hold a changed tensor in another form than memory does.
    """
    modules = {name.removesuffix(".weight") for name, (_, shape) in base.facts.items() if len(shape) == 2}
    check_patterns(adapter.config, modules, adapter.folder)
    biases = _modules_with_bias(base.facts)
    if set(adapter.changes) <= set(base.facts):
        try:
            check_complete(adapter, modules, biases)
            return dict(adapter.changes)
        except ArtifactError:  # a name in the files may look like a target that is none in memory
            pass
    names = max(known(), key=lambda names: len(names.files.keys() & adapter.changes.keys()))
    if names.files.keys() & adapter.changes.keys():
        modules, biases = names.matrices, _modules_with_bias(names.files)
    check_complete(adapter, modules, biases)
    changes = {}
    for name, change in adapter.changes.items():
        stored = names.in_file(name)
        if stored is None and name in names.files:
            raise NotOneToOne(_("the file holds {name} in another form").format(name=name))
        changes[stored or name] = change
    return changes


def _modules_with_bias(names: Iterable[str]) -> set[str]:
    return {name.removesuffix(".bias") for name in names if name.endswith(".bias")}


def merge_adapters(
    base: TensorSource,
    base_digests: Mapping[str, str],
    targets: Sequence[MergeTarget],
    out: Path,
    shard_bytes: int,
    progress: Callable[[int], None],
) -> MergeResult:
    """Write the merged tensors to `out` as safetensors. Raises NumbersError on NaN or Inf, naming the tensor.

    base_lines: the base's lines of the fingerprint, so that copied tensors need not be hashed again.
    """
    stored = plan_shards(out, {target.name: (target.dtype, target.shape) for target in targets}, shard_bytes)
    result = MergeResult(stored, list(targets))
    with ThreadPoolExecutor(min(os.cpu_count() or 1, 4)) as pool:
        work = [pool.submit(_merge_one, base, base_digests, target, result) for target in targets]
        try:
            for done, one in enumerate(work, 1):
                one.result()
                progress(done)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    _check_changed(result)
    return result


def _check_changed(result: MergeResult) -> None:
    changed = [target for target in result.targets if target.changes]
    if len(result.same) < len(changed):
        return
    never = len(result.untrained) == len(changed)
    raise ArtifactError(
        _("the merged model equals the base: the adapter was never trained")
        if never
        else _("the merged model equals the base: its changes are smaller than the precision of this dtype"),
        place=changed[0].changes[0].place if changed else "",
        remedy="" if never else "--dtype fp32",
    )


def check_rows(base: TensorSource, result: MergeResult) -> float:
    """Read three rows of every changed tensor back from the files and compare them with a recomputation in fp64.

    Returns the largest difference, as a share of the rounding limit. Raises NumbersError when it exceeds the limit.
    """
    merged = FileTensors(result.stored)
    worst = 0.0
    for target in result.targets:
        if not target.changes:
            continue
        steps = steps_of(target)
        count = row_count(target.shape)
        touched = [row for change in target.changes for row in change.rows[:3]]
        for row in sorted({0, count // 2, count - 1, *touched}):
            exact = base_rows(base, target, row, row + 1).astype(np.float64)
            for step in steps:
                exact = step.apply(exact, row, row + 1)
            found = read_fp32(merged, target.name, row, row + 1)
            allowed = ROUNDING[target.dtype] * np.abs(exact) + 1e-6 * np.abs(exact).max() + 1e-7
            worst = max(worst, float((np.abs(found - exact) / allowed).max()))
        if not worst <= 1:
            raise NumbersError(
                _(
                    "read back from the file, it differs from base + adapter by {worst:.3g} times the rounding limit"
                ).format(worst=worst),
                place=target.name,
                remedy=_("the disk or the memory may be failing; merge again"),
            )
    return worst


def _merge_one(base: TensorSource, base_digests: Mapping[str, str], target: MergeTarget, result: MergeResult) -> None:
    """Merge one tensor, write it to its place in the file, and record its line of the fingerprint."""
    facts = base.facts.get(target.source or "")
    if facts == (target.dtype, target.shape) and not target.changes:
        _copy(base, base_digests.get(target.name) if target.source == target.name else None, target, result)
        return
    if facts and facts[0] not in FLOATS:
        raise ModelError(
            _("its dtype is {facts}: a quantised base").format(facts=facts[0]),
            place=target.name,
            remedy=_("merge into the original, unquantised model"),
        )
    place, steps = result.stored[target.name], steps_of(target)
    if any(step.is_zero for step in steps):
        result.untrained.append(target.name)
    digest = start_digest(target.name, target.dtype, target.shape)
    same = facts == (target.dtype, target.shape)  # updated with each block
    least = 32 if any(change.rank > 16 for change in target.changes) else 1  # BLAS packs A again for every block
    with place.file.open("r+b") as stream:
        stream.seek(place.begin)
        for begin, end in blocks(target.shape, least):
            block = base_rows(base, target, begin, end)
            for step in steps:
                block = step.apply(block, begin, end)
            new = from_fp32(_finite(block, target.name, "merged" if steps else "base"), target.dtype)
            if target.dtype == "F16" and not np.isfinite(new.view(np.float16)).all():
                raise NumbersError(
                    _("the merged weight exceeds the range of fp16"),
                    place=target.name,
                    remedy="--dtype bf16",
                )
            same = same and np.array_equal(base.raw(target.source or "", begin, end), new)
            digest.update(new)
            stream.write(memoryview(new))
    result.lines[target.name] = digest.hexdigest()
    if target.changes and same:
        result.same.append(target.name)


def _copy(base: TensorSource, line: str | None, target: MergeTarget, result: MergeResult) -> None:
    """Copy an unchanged tensor (by the kernel if it is in a file) and check it for NaN."""
    place, digest = result.stored[target.name], start_digest(target.name, target.dtype, target.shape)
    if isinstance(base, FileTensors):
        copy_bytes(base.stored[target.source or ""], place)
    with place.file.open("r+b") as stream:
        stream.seek(place.begin)
        for begin, end in blocks(target.shape):
            raw = base.raw(target.source or "", begin, end)
            if target.dtype in FLOATS:
                _finite(to_fp32(raw, target.dtype), target.name, "base")
            if line is None:
                digest.update(raw)
            if not isinstance(base, FileTensors):
                stream.write(memoryview(raw))
    result.lines[target.name] = line or digest.hexdigest()


def size_of(target: MergeTarget) -> int:
    """Return the bytes of a target in its file."""
    return row_bytes(target.dtype, target.shape) * row_count(target.shape)


def combine_changes(base: TensorSource, targets: Sequence[MergeTarget], mix: combine.Combination) -> None:
    """Combine each target's changes instead of applying them in turn. Raises ArtifactError for a grown vocabulary."""
    for target in targets:
        if not target.changes:
            continue
        if target.source is None or target.shape != base.facts[target.source][1]:
            raise target.changes[-1].refuse(
                _("it has its own vocabulary; only adapters with the same vocabulary can be combined"),
                _("merge the adapter with the new vocabulary first"),
            )
        target.mix = mix
        if mix.how == "ties":
            keep = max(1, round(mix.density * int(np.prod(target.shape))))
            target.cuts = [_cut(base, target, ChangeStep(change), keep) for change in target.changes]


def _cut(base: TensorSource, target: MergeTarget, step: ChangeStep, keep: int) -> float:
    def magnitudes() -> Iterator[Array]:
        for begin, end in blocks(target.shape):
            exact = base_rows(base, target, begin, end).astype(np.float64)
            yield combine.magnitude_of(combine.changed(step, exact, begin, end))

    return combine.find_cut(magnitudes, keep)


def steps_of(target: MergeTarget) -> list[ChangeStep | combine.CombinedChange]:
    """Return the steps to apply: one for combined changes, else all from the last that replaces the whole tensor."""
    if target.mix:
        return [combine.CombinedChange([ChangeStep(change) for change in target.changes], target.mix, target.cuts)]
    last = max((index for index, change in enumerate(target.changes) if "whole" in change.parts), default=0)
    return [ChangeStep(change) for change in target.changes[last:]]


def base_rows(base: TensorSource, target: MergeTarget, begin: int, end: int) -> Array:
    """Return rows of the base tensor that a target starts from, in fp32; zeros for rows that the base lacks."""
    facts = base.facts.get(target.source or "")
    held = min(end, row_count(facts[1])) if facts else begin
    if held == end:
        return read_fp32(base, target.source or "", begin, end)
    block = np.zeros((end - begin, *target.shape[1:]), np.float32)
    if held > begin:
        block[: held - begin] = read_fp32(base, target.source or "", begin, held)
    return block


def _finite(block: Array, name: str, origin: str) -> Array:
    if not is_finite(block):
        raise NumbersError(
            _("the merged weight contains NaN or Inf")
            if origin == "merged"
            else _("the base's weight contains NaN or Inf"),
            place=name,
        )
    return block


def _ending(names: Iterable[str], endings: tuple[str, ...]) -> str | None:
    return next((name for name in names if name.endswith(endings)), None)


def _check_rows_of_head(base: TensorSource, targets: Mapping[str, MergeTarget], folder: Path) -> None:
    """Raise ArtifactError when an adapter brought more rows for only one of embedding and head."""
    embedding, head = _ending(targets, EMBEDDINGS), _ending(targets, HEADS)
    grown = [name in base.facts and targets[name].shape != base.facts[name][1] for name in (embedding, head) if name]
    if embedding and head and any(grown) and targets[embedding].shape[0] != targets[head].shape[0]:
        raise ArtifactError(
            _("{embedding} would have {rows} rows, but {head} has {shape}").format(
                embedding=embedding, rows=targets[embedding].shape[0], head=head, shape=targets[head].shape[0]
            ),
            place=str(folder),
            remedy=_("the adapter must bring both: modules_to_save"),
        )


def _find_layout(adapter: Adapter, config: Mapping[str, Any]) -> None:
    """Set which matrices the base stores as (in, out). The layers decide it, as in peft, whatever the adapter says."""
    family = family_of(str(config.get("model_type")))
    if family is None and adapter.config.get("fan_in_fan_out"):
        raise NotOneToOne(_("only the layers know how they store their matrices (fan_in_fan_out)"))
    for name, change in adapter.changes.items():
        change.transposed = bool(family and family.transposed) and not name.endswith((*EMBEDDINGS, *HEADS))
        if "magnitude" in change.parts and (change.transposed or "embedding_a" in change.parts):
            raise NotOneToOne(_("its DoRA norms are computed by column"))


def _unties(adapter: Adapter, changes: dict[str, AdapterChange], embedding: str) -> bool:
    """Whether this adapter unties the head from the embedding of a tied base.

    peft silently unties the pair when it trains one of the two. When it keeps them tied, it saves both, with equal
    values. Rows that are trained one by one for the embedding alone apply to both.
    """
    head = _ending(changes, HEADS)
    inside = changes.get(embedding)
    if head is None:
        return not (inside is None or adapter.config.get("ensure_weight_tying") or inside.parts.keys() == {"rows"})
    if inside is not None and same_change(inside, changes[head]):
        del changes[head]
        return False
    return True


def _twin(embedding: MergeTarget, name: str) -> MergeTarget:
    """Return a target for the other matrix of a tied pair, with the same changes."""
    return MergeTarget(name, embedding.dtype, embedding.shape, embedding.source, list(embedding.changes))


def _check_fit(target: MergeTarget, change: AdapterChange) -> None:
    """Raise ArtifactError when a change does not have the target's shape. A whole embedding or head may be larger."""
    whole = change.shape_of("whole") if "whole" in change.parts else target.shape
    vocabulary = target.name.endswith((*EMBEDDINGS, *HEADS))
    if whole != target.shape:
        if not vocabulary or whole[1:] != target.shape[1:]:
            raise _misfit(target, change, whole)
        if whole[0] < target.shape[0]:
            extra = _last_token(target)
            raise change.refuse(
                _(
                    "its vocabulary has {whole} rows, but the model already has {shape}{extra}: a vocabulary never shrinks"
                ).format(whole=whole[0], shape=target.shape[0], extra=extra),
                _("put the adapter with the smaller vocabulary first"),
            )
        target.shape = whole
    added = change.low_rank_shape()
    if added is not None and added != target.shape:
        raise _misfit(target, change, added)
    for role in ("magnitude", "bias"):
        if role in change.parts and int(np.prod(change.shape_of(role))) != target.shape[0]:
            raise _misfit(target, change, change.shape_of(role))
    if "rows" in change.parts:
        if change.shape_of("rows") != (len(change.rows), *target.shape[1:]):
            raise _misfit(target, change, change.shape_of("rows"))
        if max(change.rows) >= target.shape[0] or min(change.rows) < 0:
            raise change.refuse(
                _("it trained token {highest}, but the base has only {shape} rows").format(
                    highest=max(change.rows), shape=target.shape[0]
                )
            )


def _last_token(target: MergeTarget) -> str:
    """Return the token of the vocabulary's last row and the folder of its tokenizer, if known, for a message."""
    if not target.changes:
        return ""
    folder = Path(target.changes[-1].place)
    found = highest_token(folder)
    return f" ({found[1]}, {folder})" if found and found[0] == target.shape[0] - 1 else ""


def _misfit(target: MergeTarget, change: AdapterChange, needed: tuple[int, ...]) -> ArtifactError:
    return change.refuse(
        _("{target} has shape {shape} in the base, but the adapter needs {needed}").format(
            shape=target.shape, target=target.name, needed=needed
        ),
        _("this adapter was trained on another base"),
    )


def _missing(adapter: Adapter, names: list[str]) -> ArtifactError:
    return ArtifactError(
        _("the base lacks {count} targets of the adapter, the first: {names}").format(count=len(names), names=names[0]),
        place=str(adapter.folder),
        remedy=_("merge onto the adapter's own base"),
    )
