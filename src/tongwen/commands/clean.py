"""clean: list what finished runs no longer need, with sizes, and delete it when the user confirms.

Only what tongwen made is listed: folders that `--again` kept, and checkpoints of finished stages. What is unfinished, in use or
of somebody else stays, and so do models and adapters.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tongwen.core import artifact, console
from tongwen.core.errors import ArtifactError, MachineError, RecipeError, first_line
from tongwen.core.i18n import _
from tongwen.workflows.run_lock import is_locked
from tongwen.workflows.stage_inputs import TRAINING

ASIDE = re.compile(r".+\.old-\d+$")


@dataclass(frozen=True)
class Leftover:
    """A folder that may go. what: in the user's language; size: in bytes."""

    path: Path
    what: str
    size: int


def run(paths: Sequence[str], *, cache: bool, confirmed: bool) -> int:
    """List the leftovers below some folders, and delete them if the user says so.

    Raises:
        RecipeError: A path is no folder.
        MachineError: A folder cannot be deleted.
    """
    for path in paths:
        if not Path(path).is_dir():
            raise RecipeError(_("this is no folder"), place=path, remedy="tongwen clean RUNS")
    found = [one for path in paths for one in _below(Path(path))]
    if cache:
        found += _cached(artifact.cache_folder())
    total = sum(one.size for one in found)
    rows = [[str(one.path), one.what, console.human_bytes(one.size)] for one in found]
    if rows:
        console.table(["", _("what it is"), _("size")], rows)
    deletes = bool(found) and (confirmed or _is_confirmed(total))
    for one in found if deletes else ():
        _delete(one.path)
    if deletes:
        console.success(_("deleted: {size}").format(size=console.human_bytes(total)))
    elif found:
        console.info(_("nothing was deleted; `--yes` deletes the {size} above").format(size=console.human_bytes(total)))
    else:
        console.success(_("nothing to delete"))
    listed = [{"path": str(one.path), "what": one.what, "bytes": one.size} for one in found]
    console.emit({"found": listed, "bytes": total, "deleted": deletes})
    return 0


def _below(top: Path) -> Iterator[Leftover]:
    """Yield the leftovers in a folder of runs, a run, or a stage; in the order of their names."""
    for folder, inside, _files in os.walk(top):
        here = Path(folder)
        inside.sort()
        if is_locked(here):
            console.notice(_("{path}: a run is at work here, so all of it stays").format(path=here))
            inside.clear()
            continue
        for name in [*inside]:
            path = here / name
            if path.is_symlink() or name.endswith(".partial"):
                inside.remove(name)  # what an unfinished stage has is needed to continue it
            elif ASIDE.match(name) and artifact.is_artifact(path):
                inside.remove(name)
                yield Leftover(path, _("kept by --again"), _size(path))
            elif name == "checkpoints" and _is_finished_training(here):
                inside.remove(name)
                yield Leftover(path, _("checkpoints of a finished stage"), _size(path))


def _is_finished_training(folder: Path) -> bool:
    try:
        found = artifact.find(folder)
    except ArtifactError:
        return False
    return found is not None and found.kind in TRAINING


def _cached(folder: Path) -> Iterable[Leftover]:
    """Return what is in the user's cache; a later command makes or fetches it again."""
    entries = sorted(folder.iterdir()) if folder.is_dir() else []
    return [Leftover(path, _("cache"), _size(path)) for path in entries if not path.is_symlink()]


def _size(path: Path) -> int:
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file() and not file.is_symlink()]
    return sum(file.stat().st_size for file in files)


def _is_confirmed(size: int) -> bool:
    """Ask, where there is somebody to answer."""
    if console.SCREEN.json or not (sys.stdin.isatty() and sys.stdout.isatty()):
        return False
    answer = input(_("delete these {size}? [y/N] ").format(size=console.human_bytes(size)))
    return answer.strip().lower() in ("y", "yes", "是")


def _delete(path: Path) -> None:
    try:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
    except OSError as error:
        raise MachineError(
            _("this cannot be deleted: {error}").format(error=error.strerror or first_line(error)), place=str(path)
        ) from None
