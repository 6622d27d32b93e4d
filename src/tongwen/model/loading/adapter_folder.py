"""Find the folder of an adapter's files."""

from __future__ import annotations

from pathlib import Path

from tongwen.core.errors import ArtifactError
from tongwen.core.i18n import _


def adapter_folder(folder: Path) -> Path:
    """Return the folder of an adapter's files: this one, or the subfolder that the training scripts of 2023 used."""
    if (folder / "adapter_config.json").is_file() or not folder.is_dir():
        return folder
    below = (folder / name for name in ("adapter_model", "sft_lora_model", "pt_lora_model"))
    return next((place for place in below if place.is_dir()), folder)


def find_adapter(folder: Path) -> Path:
    """Like `adapter_folder`, but raise ArtifactError when there is no adapter."""
    place = adapter_folder(folder)
    if not (place / "adapter_config.json").is_file():
        raise no_adapter_config(place)
    return place


def no_adapter_config(folder: Path) -> ArtifactError:
    """Return the error for a folder without adapter_config.json. A bare file of tensors can be migrated."""
    bare = next((name for name in ("adapter_model.bin", "pytorch_model.bin") if (folder / name).is_file()), None)
    return ArtifactError(
        _("no adapter_config.json in this folder"),
        place=str(folder),
        remedy=f"tongwen migrate {folder} --alpha N --out {folder}-lora" if bare else "",
    )
