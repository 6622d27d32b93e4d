"""What `prepare` left in a run: whether it would be the same today, and whether its files are still as they were."""

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
    """The settings that decide what `prepare` leaves."""
    assert recipe.prepare
    return {"prepare": recipe.prepare.model_dump(mode="json", exclude=EXECUTION), "seed": recipe.seed}


def find_prepared(recipe: Recipe) -> artifact.Artifact | None:
    """What `prepare` has made of this recipe's data, if it would be the same today; for commands that only look."""
    found = artifact.find(Path(recipe.out) / "prepare")
    if found is None:
        return None
    settings = json.loads(json.dumps(prepare_settings(recipe)))
    changed = resume.differences(found.manifest["settings"], settings) or changed_files(recipe, found.manifest)
    return None if changed else found


def changed_files(recipe: Recipe, manifest: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """(file, what it was, what it is) of the files here that would be read otherwise than they were, or were not at all. A file
    that is gone was read, and what came of it is still there."""
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
    """Raise ArtifactError for a file that is not as this stage has left it: what the ledger says would not be true."""
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
