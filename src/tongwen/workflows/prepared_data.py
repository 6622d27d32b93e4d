"""The output of `prepare` in a run: whether it is up to date with the recipe, and whether its files are unchanged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tongwen.core import artifact, console, resume
from tongwen.core.errors import ArtifactError, DataError
from tongwen.core.i18n import _
from tongwen.recipe.schema import Recipe

# These decide where the work is done, not what comes out.
EXECUTION = {"executor", "tasks", "executor_options"}


def prepare_settings(recipe: Recipe) -> dict[str, Any]:
    """Return the settings that decide the result of `prepare`."""
    assert recipe.prepare
    return {"prepare": recipe.prepare.model_dump(mode="json", exclude=EXECUTION), "seed": recipe.seed}


def find_prepared(recipe: Recipe) -> artifact.Artifact | None:
    """Return the output of `prepare` if it is up to date, else None; for commands that write nothing."""
    found = artifact.find(Path(recipe.out) / "prepare")
    if found is None:
        return None
    settings = json.loads(json.dumps(prepare_settings(recipe)))
    changed = resume.differences(found.manifest["settings"], settings) or changed_files(recipe, found.manifest)
    return None if changed else found


def changed_files(recipe: Recipe, manifest: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """Return (file, before, now) of input files that changed or are new. A missing file is no change: its rows are in
    the prepared data."""
    from tongwen.data.input_parts import list_parts

    assert recipe.prepare
    known = manifest.get("files")
    if known is None:
        return []
    changed: list[tuple[str, Any, Any]] = []
    for part in list_parts(recipe.prepare, _refuse_download, lambda text: None, []):
        file = part.file
        was, now = known.get(str(file)), file.stat()
        if was is None:
            changed.append((str(file), None, f"{now.st_size} bytes"))
        elif now.st_size != was["bytes"]:
            changed.append((str(file), f"{was['bytes']} bytes", f"{now.st_size} bytes"))
        elif now.st_mtime_ns != was["modified"] and (digest := artifact.hash_file(file)) != was["sha256"]:
            changed.append((str(file), f"sha256 {was['sha256'][:12]}", f"sha256 {digest[:12]}"))
    return changed


def check_prepared(found: artifact.Artifact) -> None:
    """Raise ArtifactError if a file was changed after this stage wrote it: the ledger would no longer be true."""
    with console.waiting(_("checking the output of prepare")):
        for name, digest in found.manifest.get("made", {}).items():
            file = found.path / name
            if not file.is_file() or artifact.hash_file(file) != digest:
                raise ArtifactError(
                    _("this file differs from the one that prepare wrote"),
                    place=str(file),
                    remedy=_("change the sources instead, then tongwen run RECIPE --from prepare --again"),
                )


def _refuse_download(path: str, notify: Any) -> str:
    raise DataError(_("this is on a hub"), place=path)
