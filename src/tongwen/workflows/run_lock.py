"""The lock on a run's folder: the first process of a run holds it, so that only one run uses a folder."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tongwen.core import distributed, file_lock
from tongwen.core.i18n import _

LOCK = ".lock"  # held by the process that runs in a folder; contains its host and process id


@contextmanager
def lock_folder(out: Path) -> Iterator[None]:
    """Hold the folder's lock in the first process of a run, unless the command that started it holds it already.

    Raises MachineError with the holder's name if another run has the lock.
    """
    if not distributed.is_main_process() or distributed.is_child_process():
        yield
        return
    with file_lock.hold(out / LOCK, str(out), _("wait for it, or choose another `out`")):
        yield


def lock_holder(out: Path) -> int | None:
    """Return the id of the process on this machine that runs in a folder; None if none holds the lock.

    The text of a lock may come from elsewhere. So the lock itself is asked first. The process must have taken it, and must
    have begun before the text was written: a later one may have the same number.
    """
    import psutil

    try:
        file = out / LOCK
        found = file_lock.TEXT.fullmatch(file.read_text(encoding="utf-8"))
        if found is None or found["host"] != platform.node() or not _is_held(file):
            return None
        process = psutil.Process(int(found["number"]))
        alive = process.status() != psutil.STATUS_ZOMBIE and process.create_time() <= file.stat().st_mtime + 1.0
        return process.pid if alive and _may_hold(file, process.pid) else None
    except (OSError, ValueError, OverflowError, psutil.Error):
        return None


def is_locked(out: Path) -> bool:
    """Return whether a process runs in a folder. A process of another machine always counts as running."""
    if os.name == "nt":
        return True
    try:
        node = (out / LOCK).read_text(encoding="utf-8").split(",")[0]
    except OSError:
        return False
    return bool(node) and (node != platform.node() or lock_holder(out) is not None)


def _is_held(file: Path) -> bool:
    """Whether any process holds the lock. Windows has no such lock: there the text alone counts."""
    if os.name == "nt":
        return True
    import fcntl

    with file.open("rb") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            return True
    return False


def _may_hold(file: Path, number: int) -> bool:
    """Whether a process may be the one that took the lock. Linux lists who did."""
    try:
        lines = Path("/proc/locks").read_text(encoding="utf-8").splitlines()
        inode = str(file.stat().st_ino)
    except OSError:
        return True
    takers = {line.split()[4] for line in lines if " FLOCK " in line and line.split()[5].rpartition(":")[2] == inode}
    return not takers or str(number) in takers
