"""Check that an adapter is whole wherever one is opened: to merge it, to answer with it, and to train it further.

peft opens half an adapter without a word: pairs that the file lacks stay at their start, where they change nothing, and
the base answers alone.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tongwen.core.errors import ArtifactError
from tongwen.core.i18n import _
from tongwen.model.adapters import lineage
from tongwen.model.adapters.config import is_lora
from tongwen.model.adapters.read import check_not_empty, open_tensors, read_adapter
from tongwen.model.loading.adapter_folder import find_adapter
from tongwen.model.loading.quiet import quiet
from tongwen.model.loading.tensors import FLOATS

NOT_SAVED = ".ranknum.default"  # AdaLoRA's count of ranks, which only its training reads


def check_files(folder: Path) -> str:
    """Return the fingerprint of an adapter's tensors. It is read before the base, which takes longer.

    Raises ArtifactError or ModelError when the files are damaged.
    Of a LoRA, every tensor must have a role, and a pair both matrices; another type must have tensors of numbers.
    """
    folder = find_adapter(folder)
    if is_lora(folder):
        adapter = read_adapter(folder)
        for change in adapter.changes.values():
            change.low_rank_shape()
    tensors = open_tensors(folder)
    check_not_empty(tensors, folder)
    for name, (dtype, _unused) in tensors.facts.items():
        if dtype not in FLOATS:
            raise ArtifactError(
                _("the adapter tensor {name!r} is of type {dtype}, which nothing learns in").format(
                    name=name, dtype=dtype
                ),
                place=str(folder),
            )
    return lineage.fingerprint_of(folder, tensors)


def check_loaded(folder: Path, adapted: Any) -> None:
    """Raise ArtifactError when peft left a tensor of an adapter out, or has one that the adapter lacks."""
    from peft import set_peft_model_state_dict
    from peft.utils import load_peft_weights

    if adapted.active_peft_config.is_prompt_learning:
        return
    state = load_peft_weights(str(folder), device="cpu")
    # peft saves a resized module three times: before training, and under two names after it
    again = {name for name in state if name.replace(".modules_to_save.", ".") in state.keys() - {name}}
    with quiet():
        found = set_peft_model_state_dict(adapted, state)
    odd = [name for name in found.unexpected_keys if name not in again and ".original_module." not in name]
    parts = dict(adapted.named_parameters(remove_duplicate=False))
    lacks = {name for name in found.missing_keys if ".default" in name and not name.endswith(NOT_SAVED)}
    loaded = {id(part) for name, part in parts.items() if name not in lacks}  # a tied one may have two names
    lost = [name for name in lacks if id(parts.get(name)) not in loaded]
    if odd:
        raise ArtifactError(
            _("{count} tensors do not fit this base, the first: {name}").format(count=len(odd), name=min(odd)),
            place=str(folder),
            remedy=_("this adapter was trained on another base"),
        )
    if lost:
        raise ArtifactError(
            _("{count} tensors that its config asks for are not in its file, the first: {lost}").format(
                count=len(lost), lost=min(lost)
            ),
            place=str(folder),
            remedy=_("part of it was lost when it was saved: save it again"),
        )
