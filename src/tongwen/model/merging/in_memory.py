"""Merge adapters in memory with peft: for adapters that cannot be merged tensor by tensor, and as a reference."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tongwen.core.errors import ArtifactError
from tongwen.core.i18n import _
from tongwen.model.adapters.chain import open_adapter
from tongwen.model.loading.load import ModelRef, load_model


def open_in_memory(ref: ModelRef, adapters: Sequence[Path], *, live: bool) -> Any:
    """Return the model in fp32 with all adapters merged. live: leave the last adapter unmerged.

    Raises ArtifactError when peft loads only a part of an adapter.
    """
    import torch
    from peft import get_peft_model_state_dict

    model = load_model(ref, torch.float32)
    for index, folder in enumerate(adapters):
        adapted = open_adapter(model, str(folder), None)
        _check_whole(folder, set(get_peft_model_state_dict(adapted)))
        model = adapted if live and index == len(adapters) - 1 else adapted.merge_and_unload(safe_merge=True)
    return model.eval()


def logits_of(model: Any, ids: Sequence[int]) -> Any:
    """Return the logits (T, V) as a numpy array."""
    import torch

    with torch.no_grad():
        return model(torch.tensor([list(ids)])).logits[0].float().numpy()


def _check_whole(folder: Path, taken: set[str]) -> None:
    from tongwen.model.loading.tensors import open_tensors

    held = set(open_tensors(folder, "adapter_model.bin").facts)
    if held != taken:
        odd = sorted(held ^ taken)[0]
        raise ArtifactError(
            _("{count} tensors do not fit this base, the first: {odd}").format(count=len(held ^ taken), odd=odd),
            place=str(folder),
            remedy=_("this adapter was trained on another base"),
        )
