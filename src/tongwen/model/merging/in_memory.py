"""Merge adapters in memory with peft: for adapters that cannot be merged tensor by tensor, and as the judge of a merge.

The judge is peft's own live layers: their logits before anything is merged. What peft merges then must agree with them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tongwen.core.errors import NumbersError
from tongwen.core.i18n import _
from tongwen.core.safetensors_io import TensorSource, blocks
from tongwen.model.adapters.chain import merge_adapter, open_adapter, retie_if_equal
from tongwen.model.adapters.read import AdapterChange, same_fp32
from tongwen.model.loading.architecture import auto_class, load_config
from tongwen.model.loading.load import load_model
from tongwen.model.loading.loader_errors import explain_errors
from tongwen.model.loading.model_ref import ModelRef
from tongwen.model.loading.quiet import quiet
from tongwen.model.loading.tensors import FileTensors, TorchTensors, read_fp32, torch_name
from tongwen.model.merging import parity
from tongwen.model.merging.merge import ROUNDING, MergeResult, MergeTarget, grow, targets_of, untie

TOKENS = 64  # a whole model is in memory anyway; with more tokens, more experts are asked


@dataclass
class PeftMerge:
    """What peft makes of a base and its adapters.

    ids, logits: a sequence, and the logits (T, V) of the live layers
    tensors:     the merged weights in fp32, under the names of the model's files
    tied:        whether head and embedding are still one matrix
    dtype:       of the base's config
    rows:        of the embedding
    """

    ids: list[int]
    logits: Any
    tensors: TensorSource
    tied: bool
    dtype: str
    rows: int


def merge_with_peft(ref: ModelRef, base: TensorSource, adapters: Sequence[Path]) -> PeftMerge:
    """Merge all adapters in order, in fp32.

    Raises ArtifactError when peft loads only a part of an adapter, NumbersError when what it merged does not compute what
    its live layers do.
    """
    import torch

    dtype = load_config(ref).dtype or torch.float32
    model = load_model(ref, torch.float32)
    for folder in adapters:
        adapted = open_adapter(model, str(folder), None).eval()
        ids = parity.fixed_ids(adapted.get_input_embeddings().weight.shape[0], TOKENS)
        with explain_errors(ModelRef(str(folder), str(folder))):
            live = logits_of(adapted, ids)
        model = merge_adapter(adapted, str(folder)).eval()
        parity.check_difference(live, logits_of(model, ids), parity.LIMITS["F32"])
    rows = model.get_input_embeddings().weight.shape[0]
    tensors = TorchTensors(_file_tensors(model, base))
    return PeftMerge(ids, live, tensors, retie_if_equal(model), torch_name(dtype), rows)


def plan_from_peft(
    base: TensorSource, config: dict[str, Any], made: PeftMerge, folder: Path, dtype: str | None
) -> tuple[list[MergeTarget], dict[str, Any], list[str]]:
    """Like `plan_targets`, for what peft merged: each tensor that it changed is brought whole, all others stay.

    A base whose files use other names than transformers writes is written under transformers' names.
    """
    targets, notices = targets_of(base, dtype), []
    new = [name for name in made.tensors.facts if name not in targets]
    if len(new) > (0 if made.tied else 1):
        left = [name for name in targets if name not in made.tensors.facts]
        notices.append(
            _(
                "the base's files use other names than transformers: the merged model has {new} in place of {left}"
            ).format(new=new[0], left=left[0] if left else "-")
        )
        targets = {}
    for name, (_kind, shape) in made.tensors.facts.items():
        target = targets.setdefault(name, MergeTarget(name, dtype or made.dtype, shape, None))
        target.shape = shape
        if target.source is None or not same_fp32(made.tensors, base, name):
            target.changes.append(AdapterChange(made.tensors, str(folder), parts={"whole": name}))
    if not made.tied:
        untie(config)
    if any(target.source and target.shape != base.facts[target.source][1] for target in targets.values()):
        grow(config, made.rows)
    return list(targets.values()), config, notices


def check_tensors(made: PeftMerge, merged: MergeResult) -> None:
    """Raise NumbersError when a merged tensor is not what peft merged, but for rounding."""
    found = FileTensors(merged.stored)
    for name in made.tensors.facts.keys() & found.facts.keys():
        kind, shape = found.facts[name]
        for rows in blocks(shape):
            expected = read_fp32(made.tensors, name, *rows)
            apart = np.abs(read_fp32(found, name, *rows) - expected)
            allowed = ROUNDING[kind] * np.abs(expected) + 1e-5 * np.abs(expected).max() + 1e-7
            if not (apart <= allowed).all():
                raise NumbersError(
                    _("the merged tensor is not the one that peft merges: they differ by up to {apart:.3g}").format(
                        apart=float(apart.max())
                    ),
                    place=name,
                )


def logits_of(model: Any, ids: Sequence[int]) -> Any:
    """Return the logits (T, V) as a numpy array."""
    import torch

    with torch.no_grad():
        return model(torch.tensor([list(ids)])).logits[0].float().numpy()


def logits_of_folder(folder: Path, ids: Sequence[int]) -> Any:
    """Return the logits (T, V) of a merged folder, opened as any user would: by transformers alone."""
    import torch

    place = ModelRef(str(folder), str(folder))
    with quiet(), explain_errors(place):
        return logits_of(auto_class(load_config(place)).from_pretrained(folder, dtype=torch.float32).eval(), ids)


def _file_tensors(model: Any, base: TensorSource) -> dict[str, Any]:
    """Return a model's float tensors under the names that transformers writes. Tied tensors have those of the base."""
    from transformers.core_model_loading import revert_weight_conversion

    state = dict(revert_weight_conversion(model, model.state_dict()))
    buffers = {name for name, _part in model.named_buffers()}
    out: dict[str, Any] = {}
    seen: set[tuple[int, int]] = set()
    for name in sorted(state, key=lambda name: name not in base.facts):
        tensor = state[name]
        place = (tensor.data_ptr(), tensor.numel())
        if not tensor.is_floating_point() or (name not in base.facts and (place in seen or name in buffers)):
            continue
        seen.add(place)
        out[name] = tensor
    return out
