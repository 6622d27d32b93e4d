"""Find a model by name: folder, hub id, `modelscope:id`, `.gguf` file, or stage folder; download it if it is not here."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from tongwen.core import artifact
from tongwen.core.errors import MachineError, MissingPackage, ModelError
from tongwen.core.i18n import _
from tongwen.model.loading.gguf_header import check_header
from tongwen.model.loading.loader_errors import explain_errors
from tongwen.model.loading.model_ref import ModelRef

WEIGHTS = ("*.safetensors", "pytorch_model*.bin", "*.gguf")


def locate(name: str) -> ModelRef:
    """Find a model by name. Raises ModelError when a folder holds none."""
    if name.startswith("modelscope:"):
        return ModelRef(name, _from_modelscope(name.removeprefix("modelscope:")))
    if not name.strip():
        raise ModelError(_("no model is given"), place="MODEL", remedy="Qwen/Qwen3-0.6B")
    path = Path(name)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ModelError(_("there is no such file"), place=name)
        check_header(path)
        return ModelRef(name, str(path.parent), gguf=path.name)
    if not path.exists():
        if not _is_hub_id(name):
            raise ModelError(
                _("there is no such folder"),
                place=name,
                remedy=_("give a folder, a hub id such as Qwen/Qwen3-8B, or modelscope:Qwen/Qwen3-8B"),
            )
        return ModelRef(name, name)
    return _locate_local(name, path)


def _is_hub_id(name: str) -> bool:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def _locate_local(name: str, path: Path) -> ModelRef:
    if path.is_file():
        raise ModelError(_("a model must be a folder or a .gguf file"), place=name)
    stage = artifact.find(path)
    if stage and stage.kind in ("pretrain", "sft", "prefer") and (path / "adapter_config.json").is_file():
        below = locate(str(stage.manifest["parents"].get("base", {}).get("path")))
        return replace(below, name=name, adapters=(*below.adapters, str(path)))
    if next(path.glob("consolidated.*.pth"), None) and not (path / "config.json").is_file():
        raise ModelError(
            _("these are original LLaMA files"),
            place=name,
            remedy=f"tongwen convert {name} --to hf --out {path.name}-hf",
        )
    if not (path / "config.json").is_file():
        ggufs = sorted(path.glob("*.gguf"))
        if len(ggufs) == 1:
            check_header(ggufs[0])
            return ModelRef(name, str(path), gguf=ggufs[0].name)
        if (path / "adapter_config.json").is_file():
            base = artifact.read_json(path / "adapter_config.json").get("base_model_name_or_path")
            raise ModelError(
                _("this folder holds an adapter, not a model"),
                place=name,
                remedy=f"tongwen chat {base} --adapter {name}",
            )
        raise ModelError(
            _("no config.json in this folder: it is not a model"),
            place=name,
            remedy=_("in a run, only the folder of the `merge` stage is a model"),
        )
    if not any(next(path.glob(pattern), None) for pattern in WEIGHTS):
        raise ModelError(
            _("this model folder has no weights"),
            place=name,
            remedy=_("one of these is needed: {weights}").format(weights=_(", ").join(WEIGHTS)),
        )
    return ModelRef(name, str(path))


def cached_folder(hub_id: str) -> Path | None:
    """Return a hub model's snapshot folder in the local cache; None if it is not cached."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(hub_id, "config.json")
    return Path(found).parent if isinstance(found, str) else None


def ensure_local(ref: ModelRef) -> ModelRef:
    """Return the model as a local folder. Download a hub model that is not in the cache yet."""
    if ref.is_local or ref.gguf:
        return ref
    folder = cached_folder(ref.folder)
    if folder is None or not any(next(folder.glob(pattern), None) for pattern in WEIGHTS):
        from huggingface_hub import snapshot_download

        with explain_errors(ref):
            folder = Path(snapshot_download(ref.folder))
    return ModelRef(ref.name, str(folder))


def _from_modelscope(name: str) -> str:
    try:
        from modelscope import snapshot_download
    except ImportError:
        raise MissingPackage("modelscope", _("models from ModelScope"), "modelscope") from None
    try:
        return str(snapshot_download(name, local_files_only=bool(os.environ.get("HF_HUB_OFFLINE"))))
    except Exception as error:
        raise MachineError(
            _("cannot get this model from ModelScope: {error}").format(error=error), place=name
        ) from None
