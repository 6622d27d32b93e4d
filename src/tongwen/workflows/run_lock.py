"""The lock on a run's folder: the first process of a run holds it, so that only one run uses a folder."""

from __future__ import annotations

import os
import platform
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from tongwen.core import distributed
from tongwen.core.errors import MachineError
from tongwen.core.i18n import _

LOCK = ".lock"  # held by the process that runs in a folder; contains its host and process id
TEXT = re.compile(r"(?P<host>.*), process (?P<number>\d+), since.*\s*")
TRIES, WAIT = 10, 0.05  # a process that only looks whether a folder is locked holds the lock for an instant


@contextmanager
def lock_folder(out: Path) -> Iterator[None]:
    """Hold the folder's lock in the first process of a run, unless the command that started it holds it already.

    Raises MachineError with the holder's name if another run has the lock.
    """
    if not distributed.is_main_process() or distributed.is_child_process() or os.name == "nt":
        yield
        return
    with (out / LOCK).open("a+", encoding="utf-8") as stream:
        if not _acquire(stream):
            stream.seek(0)
            owner = stream.read().strip()
            raise MachineError(
                _("another tongwen is running in this folder: {owner}, or a process that it started").format(
                    owner=owner
                ),
                place=str(out),
                remedy=_("wait for it, or choose another `out`"),
            )
        os.set_inheritable(stream.fileno(), True)  # processes that it launches may still be saving when it is killed
        stream.truncate(0)
        stream.write(f"{platform.node()}, process {os.getpid()}, since {time.strftime('%Y-%m-%d %H:%M:%S')}\n")
        stream.flush()
        try:
            yield
        finally:
            stream.truncate(0)


def is_lock(file: Path) -> bool:
    """Whether a file is empty, or has the text of a lock."""
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return False
    return not text or TEXT.fullmatch(text) is not None


def lock_holder(out: Path) -> int | None:
    """Return the id of the process on this machine that runs in a folder; None if none holds the lock.

    The text of a lock may come from elsewhere. So the lock itself is asked first. The process must have taken it, and must
    have begun before the text was written: a later one may have the same number.
    """
    import psutil

    try:
        file = out / LOCK
        found = TEXT.fullmatch(file.read_text(encoding="utf-8"))
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


def _acquire(stream: IO[str]) -> bool:
    import fcntl

    for _try in range(TRIES):
        with suppress(OSError):
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        time.sleep(WAIT)
    return False


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
