"""Lock files: the first command that opens one holds it, so that only one command writes one output.

The kernel drops the lock of a process that dies. Windows has none of this.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tongwen.core.errors import MachineError
from tongwen.core.i18n import _


@contextmanager
def lock_output(out: str | Path) -> Iterator[None]:
    """Hold `OUT.lock` while a command writes OUT. Raises MachineError with the holder's name if another command has it."""
    output = Path(os.path.abspath(out))  # noqa: PTH100 (without resolving links)
    if not output.name:  # the root folder
        yield
        return
    file = output.with_name(output.name + ".lock")
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
    import fcntl

    with file.open("a+", encoding="utf-8") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            is_current = file.exists() and os.path.samestat(
                file.stat(), os.fstat(stream.fileno())
            )  # else its holder has just ended and removed it
        except OSError:
            is_current = False
        if not is_current:
            stream.seek(0)
            owner = stream.read().strip()
            raise MachineError(
                _("another tongwen is running in this folder: {owner}, or a process that it started").format(
                    owner=owner
                ),
                place=place,
                remedy=remedy,
            ) from None
        os.set_inheritable(stream.fileno(), True)
        stream.truncate(0)
        stream.write(f"{platform.node()}, process {os.getpid()}, since {time.strftime('%Y-%m-%d %H:%M:%S')}\n")
        stream.flush()
        try:
            yield
        finally:
            stream.truncate(0)
