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
    """Return the id of the process on this machine that runs in a folder; None if the process that wrote it is dead."""
    import psutil

    try:
        lock = out / LOCK
        node, number, *_unused = lock.read_text(encoding="utf-8").split(", ")
        process = psutil.Process(int(number.removeprefix("process ")))
        alive = process.status() != psutil.STATUS_ZOMBIE and process.create_time() <= lock.stat().st_mtime + 1.0
        return process.pid if alive and node == platform.node() else None
    except (OSError, ValueError, psutil.Error):
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
