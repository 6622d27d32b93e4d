"""A base with the adapters that stand on it: each one's change goes into the weights, in their order, summed in fp32.

So a stage that stands on an adapter stage, and whoever talks to it, opens the whole chain.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tongwen import artifact
from tongwen.errors import ModelError
from tongwen.language import say
from tongwen.model.fingerprint import fingerprint_model, fingerprint_stack
from tongwen.model.load import Place, load_model, open_adapter


def open_stack(
    place: Place, dtype: torch.dtype, quantize: str = "", device_map: str | None = None, *, live: bool = False
) -> tuple[Any, str | None]:
    """(model, its fingerprint). A prompt that was learned (prefix or p-tuning) has no change of weights: it stays on top.
    live: so may a single adapter on a quantised base, for those who only ask.

    Raises ArtifactError when an adapter was trained on something else, ModelError when the base would be quantised before
    an adapter's change is in its weights.
    """
    if quantize and live and len(place.adapters) == 1:
        base = load_model(place, dtype, quantize, device_map)
        return open_adapter(base, place.adapters[0], fingerprint_model(place)), None
    if quantize and place.adapters:
        raise ModelError(
            say("an adapter cannot be put into quantised weights", "无法把适配器并入量化后的权重"),
            place=place.name,
            remedy=say(
                f"tongwen merge first, and name the merged folder as the base; the adapter: {place.adapters[0]}",
                f"先 tongwen merge，并以合并后的文件夹为底座；适配器：{place.adapters[0]}",
            ),
        )
    model = load_model(place, torch.float32 if place.adapters else dtype, quantize, device_map)
    fingerprint = fingerprint_model(place)  # after it was opened: only then a hub's files are surely here
    for folder in place.adapters:
        model = open_adapter(model, folder, fingerprint)
        if not model.active_peft_config.is_prompt_learning:
            model = model.merge_and_unload()
        if fingerprint:
            fingerprint = fingerprint_stack(fingerprint, _fingerprint_of(folder))
    return (model.to(dtype) if place.adapters else model), fingerprint


def _fingerprint_of(adapter: str) -> str:
    made = artifact.find(Path(adapter))
    return made.fingerprint if made else str(fingerprint_model(Place(adapter, adapter)))
