"""A base with the adapters that stand on it: each one's change goes into the weights, in their order, summed in fp32.

So a stage that stands on an adapter stage, and whoever talks to it, opens the whole chain.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tongwen.core import artifact
from tongwen.core.errors import ArtifactError, ModelError
from tongwen.core.i18n import _
from tongwen.model.adapters.read import EMBEDDINGS, whole_rows
from tongwen.model.loading.fingerprint import fingerprint_chain, fingerprint_model
from tongwen.model.loading.load import ModelRef, explain_errors, find_adapter, load_model, quiet


def open_adapter_chain(
    ref: ModelRef, dtype: torch.dtype, quantize: str = "", device_map: str | None = None, *, live: bool = False
) -> tuple[Any, str | None]:
    """(model, its fingerprint). A prompt that was learned (prefix or p-tuning) has no change of weights: it stays on top.
    live: so may a single adapter on a quantised base, for those who only ask.

    Raises ArtifactError when an adapter was trained on something else, ModelError when the base would be quantised before
    an adapter's change is in its weights.
    """
    if quantize and live and len(ref.adapters) == 1:
        base = load_model(ref, dtype, quantize, device_map)
        return open_adapter(base, ref.adapters[0], fingerprint_model(ref)), None
    if quantize and ref.adapters:
        raise ModelError(
            _("an adapter cannot be merged into quantised weights"),
            place=ref.name,
            remedy=_("run tongwen merge first and use the merged folder as the base; the adapter: {adapters}").format(
                adapters=ref.adapters[0]
            ),
        )
    model = load_model(ref, torch.float32 if ref.adapters else dtype, quantize, device_map)
    fingerprint = fingerprint_model(ref)  # after it was opened: only then a hub's files are surely here
    for folder in ref.adapters:
        model = open_adapter(model, folder, fingerprint)
        if not model.active_peft_config.is_prompt_learning:
            model = model.merge_and_unload()
        if fingerprint:
            fingerprint = fingerprint_chain(fingerprint, _fingerprint_of(folder))
    return (model.to(dtype) if ref.adapters else model), fingerprint


def open_adapter(model: Any, folder: str, fingerprint_of_base: str | None, *, trainable: bool = False) -> Any:
    """The model with an adapter on it. Refuses an adapter that was trained on another base."""
    from peft import PeftModel

    path = find_adapter(Path(folder))
    folder = str(path)
    stage = artifact.find(path)
    trained_on = stage.manifest["parents"].get("base", {}).get("fingerprint") if stage else None
    if trained_on and fingerprint_of_base and trained_on != fingerprint_of_base:
        raise ArtifactError(
            _(
                "this adapter was trained on another base: {trained_on}; the current base is {fingerprint_of_base}"
            ).format(trained_on=trained_on[:12], fingerprint_of_base=fingerprint_of_base[:12]),
            place=folder,
            remedy=_("use the base {path}").format(path=stage.manifest["parents"]["base"]["path"] if stage else ""),
        )
    resize_for_adapter(model, path)
    with quiet(), explain_errors(ModelRef(folder, folder)):
        return PeftModel.from_pretrained(model, folder, is_trainable=trainable)


def resize_for_adapter(model: Any, adapter: Path) -> None:
    """Rows for an adapter that brings a larger vocabulary, as Chinese-LLaMA's do: its embedding and head take their place."""
    rows, held = whole_rows(adapter), model.get_input_embeddings().weight.shape[0]
    wanted = max(rows.values(), default=held)
    if wanted == held:
        return
    if wanted < held:
        problem = _(
            "its vocabulary has {wanted} rows, but the model already has {held}: a vocabulary never shrinks"
        ).format(wanted=wanted, held=held)
    elif len(rows) < 2 and not model.config.get_text_config().tie_word_embeddings:
        alone = next(iter(rows))
        lacks = _("the head") if alone.endswith(EMBEDDINGS) else _("the embedding")
        problem = _("it brings {wanted} rows and the model has only {held}, but it lacks {lacks}").format(
            wanted=wanted, held=held, lacks=lacks
        )
    else:
        model.resize_token_embeddings(wanted, mean_resizing=False)
        return
    raise ArtifactError(
        problem,
        place=str(adapter),
        remedy=_("give the base it was trained on, and the adapters below it"),
    )


def _fingerprint_of(adapter: str) -> str:
    made = artifact.find(Path(adapter))
    return made.fingerprint if made else str(fingerprint_model(ModelRef(adapter, adapter)))
