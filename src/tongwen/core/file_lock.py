"""Lock files: the first command that opens one holds it, so that only one command writes one output.

The kernel drops the lock of a process that dies. Windows has none of this.
"""

from __future__ import annotations

import os
import platform
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from tongwen.core.errors import MachineError, RecipeError
from tongwen.core.i18n import _

TEXT = re.compile(r"(?P<host>.*), process (?P<number>\d+), since.*\s*")
TRIES, WAIT = 10, 0.05  # a process that only looks whether a file is locked holds the lock for an instant


@contextmanager
def lock_output(out: str | Path) -> Iterator[None]:
    """Hold `OUT.lock` while a command writes OUT.

    Raises MachineError with the holder's name if another command has it, RecipeError if tongwen did not write this file.
    """
    output = Path(os.path.abspath(out))  # noqa: PTH100 (without resolving links)
    if not output.name:  # the root folder
        yield
        return
    file = output.with_name(output.name + ".lock")
    if os.path.lexists(file) and not is_lock(file):
        raise RecipeError(
            _("this name is needed for the lock of the output, but tongwen did not write this file"),
            place=str(file),
            remedy=_("move it away, or choose another output"),
        )
    file.parent.mkdir(parents=True, exist_ok=True)
    with hold(file, str(out), _("wait for it, or choose another --out")):
        try:
            yield
        finally:
            file.unlink(missing_ok=True)


@contextmanager
def hold(file: Path, place: str, remedy: str) -> Iterator[None]:
    """Hold a lock file, with this process's host and id in it. Processes that this one starts hold it, too: they may still be
    saving when this one is killed."""
    if os.name == "nt":
        yield
        return
    with file.open("a+", encoding="utf-8") as stream:
        # A holder that has just ended has removed the file: its lock says nothing.
        is_current = _acquire(stream) and file.exists() and os.path.samestat(file.stat(), os.fstat(stream.fileno()))
        if not is_current:
            stream.seek(0)
            owner = stream.read().strip()
            raise MachineError(
                _("another tongwen is running in this folder: {owner}, or a process that it started").format(
                    owner=owner
                ),
                place=place,
                remedy=remedy,
            )
        os.set_inheritable(stream.fileno(), True)
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


def _acquire(stream: IO[str]) -> bool:
    import fcntl

    for _try in range(TRIES):
        with suppress(OSError):
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        time.sleep(WAIT)
    return False
