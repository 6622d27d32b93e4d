"""Open a base with a chain of adapters: each adapter is merged into the weights in order, in fp32.

Stages whose base is an adapter stage, and the commands that generate text, use this to open the whole chain.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import torch

from tongwen.core import artifact
from tongwen.core.errors import ArtifactError, ModelError, first_line
from tongwen.core.i18n import _
from tongwen.model.adapters.lineage import ModelBelow
from tongwen.model.adapters.patterns import check_patterns
from tongwen.model.adapters.read import EMBEDDINGS, whole_rows
from tongwen.model.adapters.targets import is_tied
from tongwen.model.adapters.whole import check_files, check_loaded
from tongwen.model.loading.adapter_folder import find_adapter
from tongwen.model.loading.fingerprint import fingerprint_model
from tongwen.model.loading.load import load_model
from tongwen.model.loading.loader_errors import explain_errors
from tongwen.model.loading.model_ref import ModelRef
from tongwen.model.loading.quiet import quiet


def open_adapter_chain(
    ref: ModelRef, dtype: torch.dtype, quantize: str = "", device_map: str | None = None, *, live: bool = False
) -> tuple[Any, str | None]:
    """Return (model, its fingerprint). A learned prompt (prefix or p-tuning) changes no weights and stays unmerged.

    live: a single adapter on a quantised base may stay unmerged too; for inference only.

    Raises ArtifactError when an adapter was trained on another base, ModelError when an adapter would have to be merged
    into quantised weights.
    """
    own = [check_files(Path(folder)) for folder in ref.adapters]
    if quantize and live and len(ref.adapters) == 1:
        base = load_model(ref, dtype, quantize, device_map)
        return _open(base, find_adapter(Path(ref.adapters[0])), _below(fingerprint_model(ref))), None
    if quantize and ref.adapters:
        raise ModelError(
            _("an adapter cannot be merged into quantised weights"),
            place=ref.name,
            remedy=_("run tongwen merge first and use the merged folder as the base; the adapter: {adapters}").format(
                adapters=ref.adapters[0]
            ),
        )
    model = load_model(ref, torch.float32 if ref.adapters else dtype, quantize, device_map)
    below = _below(fingerprint_model(ref))  # after loading, which downloads a hub model's files
    for folder, fingerprint_of_adapter in zip(ref.adapters, own, strict=True):
        path = find_adapter(Path(folder))
        model = _open(model, path, below)
        if not model.active_peft_config.is_prompt_learning:
            model = merge_adapter(model, folder)
        if below:
            below.add(fingerprint_of_adapter, _trained_on(path)[0])
    return (model.to(dtype) if ref.adapters else model), below.fingerprint if below else None


def _below(fingerprint: str | None) -> ModelBelow | None:
    return ModelBelow(fingerprint) if fingerprint else None


def _trained_on(adapter: Path) -> tuple[str | None, str]:
    """Return (fingerprint, path) of the base that an adapter's manifest names."""
    stage = artifact.find(adapter)
    base = stage.manifest["parents"].get("base", {}) if stage else {}
    return base.get("fingerprint"), str(base.get("path") or "")


def open_adapter(model: Any, folder: str, fingerprint_of_base: str | None, *, trainable: bool = False) -> Any:
    """Load an adapter onto a model. Raises ArtifactError when it is not whole, or was trained on another base."""
    path = find_adapter(Path(folder))
    check_files(path)
    return _open(model, path, _below(fingerprint_of_base), trainable=trainable)


def _open(model: Any, path: Path, below: ModelBelow | None, *, trainable: bool = False) -> Any:
    """Like `open_adapter`, for files that were checked."""
    from peft import PeftModel

    folder = str(path)
    recorded, named = _trained_on(path)
    if recorded and below and not below.is_base_of(path, recorded, named):
        raise ArtifactError(
            _(
                "this adapter was trained on another base: {trained_on}; the current base is {fingerprint_of_base}"
            ).format(trained_on=recorded[:12], fingerprint_of_base=below.fingerprint[:12]),
            place=folder,
            remedy=_("use the base {path}").format(path=named),
        )
    resize_for_adapter(model, path)
    check_patterns(
        artifact.read_json(path / "adapter_config.json"), (name for name, _module in model.named_modules()), path
    )
    with quiet(), explain_errors(ModelRef(folder, folder)):
        adapted = PeftModel.from_pretrained(model, folder, is_trainable=trainable)
        check_loaded(path, adapted)
    return adapted


def merge_adapter(adapted: Any, folder: str) -> Any:
    """Return the model with its adapter merged. Raises ModelError when peft cannot merge it.

    peft adds to a weight in its place. A matrix that head and embedding share would be changed for both by an adapter of
    one, so each adapted layer gets a matrix of its own first; where the two come out equal, they are one again.
    """
    _separate(adapted)
    try:
        with quiet():
            model = adapted.merge_and_unload(safe_merge=True)
    except (ValueError, NotImplementedError, RuntimeError, TypeError) as error:
        raise ModelError(
            _("peft cannot merge this adapter: {reason}").format(reason=first_line(error)), place=folder
        ) from error
    if not retie_if_equal(model):
        model.config.tie_word_embeddings = False
    return model


def retie_if_equal(model: Any) -> bool:
    """Make head and embedding one matrix where they are equal. Return whether no head of its own is left."""
    inside, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head is None or head.weight is inside.weight:
        return True
    if not torch.equal(head.weight, inside.weight):
        return False
    head.weight = inside.weight
    return True


def _separate(adapted: Any) -> None:
    from peft.tuners.tuners_utils import BaseTunerLayer

    places = Counter(id(part) for _name, part in adapted.named_parameters(remove_duplicate=False))
    bases = [module.get_base_layer() for module in adapted.modules() if isinstance(module, BaseTunerLayer)]
    for base in {id(base): base for base in bases}.values():
        for name, part in list(base.named_parameters(recurse=False)):
            if places[id(part)] > 1:
                setattr(base, name, torch.nn.Parameter(part.detach().clone(), requires_grad=False))


def resize_for_adapter(model: Any, adapter: Path) -> None:
    """Enlarge the model's embedding and head for an adapter that brings larger ones, as Chinese-LLaMA's do.

    Raises ArtifactError when the adapter's are smaller, or when it brings only one of the two.
    """
    rows, held = whole_rows(adapter), model.get_input_embeddings().weight.shape[0]
    wanted = max(rows.values(), default=held)
    if wanted == held:
        return
    if wanted < held:
        problem = _(
            "its vocabulary has {wanted} rows, but the model already has {held}: a vocabulary never shrinks"
        ).format(wanted=wanted, held=held)
    elif len(rows) < 2 and not is_tied(model):
        alone = next(iter(rows))
        lacks = _("the head") if alone.endswith(EMBEDDINGS) else _("the embedding")
        problem = _("it brings {wanted} rows and the model has only {held}, but it lacks {missing}").format(
            wanted=wanted, held=held, missing=lacks
        )
    else:
        model.resize_token_embeddings(wanted, mean_resizing=False)
        return
    raise ArtifactError(
        problem,
        place=str(adapter),
        remedy=_("give the base it was trained on, and the adapters below it"),
    )
