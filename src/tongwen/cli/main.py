"""The entry point of the command line: runs one command and turns its errors into messages and exit codes."""

from __future__ import annotations

import errno
import os
import signal
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING

from tongwen.core.i18n import _
from tongwen.core.stop_signals import StopSignal, raise_on_stop_signals
from tongwen.core.terminal_text import use_any_encoding

if TYPE_CHECKING:
    import argparse

# Errors of a path that cannot be what it is used for: too long, through a file, a folder, or in a circle.
NO_SUCH_PATH = (errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR, errno.ELOOP)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code (see docs/errors.md)."""
    with raise_on_stop_signals():
        arguments = None
        try:
            use_any_encoding()
            from tongwen.cli.parser import parse  # inside: a stop signal may arrive during the imports

            arguments = parse(argv)
            arguments.main = main  # `migrate --run` runs the commands that it prints
            return _run(arguments)
        except BaseException as error:
            stop = _stop_behind(error)
            if stop is None:
                raise
            ends_well = (
                isinstance(stop, StopSignal) and stop.number == signal.SIGTERM and arguments and arguments.serves
            )
            return 0 if ends_well else _interrupted()


def _stop_behind(error: BaseException | None) -> KeyboardInterrupt | None:
    """Return the stop signal or Ctrl-C behind an error: a C extension whose import is interrupted raises one of its own."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error


def _run(arguments: argparse.Namespace) -> int:
    """Run the command; return its exit code, or that of its error, with a message."""
    from tongwen.core import distributed  # after parse, which exits on --help: these imports take a third of its time
    from tongwen.core.errors import TongwenError
    from tongwen.core.file_lock import lock_output

    distributed.read_launcher_environment()
    if distributed.is_child_process():
        distributed.end_with_parent(signal.SIGKILL)  # its launcher passes on each request to save
    _silence_libraries()
    if arguments.json:
        from tongwen.core import console

        console.SCREEN.use_json()
    try:
        with lock_output(arguments.out) if arguments.writes and arguments.out else nullcontext():
            return int(arguments.run_command(arguments))
    except TongwenError as error:
        return _fail(error.exit_code, error.text())
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if isinstance(error, OSError) and error.errno in NO_SUCH_PATH:
            return _fail(2, f"{error.filename}: {error.strerror}")
        cause = _machine_cause(error)
        if cause is None:
            raise
        return _fail(5, cause)


def _interrupted() -> int:
    again = _("the same command continues")
    return _fail(130, _("interrupted; {again}").format(again=again))


def _silence_libraries() -> None:
    """Silence bitsandbytes and DeepSpeed, which warn at every start that features are missing on a CPU."""
    import logging

    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    logging.getLogger("DeepSpeed").addFilter(lambda record: record.levelno >= logging.ERROR)


def _fail(code: int, message: str) -> int:
    from tongwen.core import console, distributed

    if distributed.claim_exit(code) and message:
        console.error(message)
    console.emit({"error": message, "exit_code": code})
    return code


def _machine_cause(error: Exception) -> str | None:
    """Return a message for an error of the machine (disk, memory, permission); None for a bug of ours."""
    from tongwen.core.distributed import is_lost_peer
    from tongwen.core.errors import is_disk_error, is_disk_full, is_out_of_memory

    text = str(error)
    if is_out_of_memory(error):
        cures = _("a smaller model, shorter texts, or more memory")
        return _("out of memory: {text}\n  → {remedies}").format(
            text=text.splitlines()[0][:160] if text else "", remedies=cures
        )
    if is_lost_peer(text):
        return _(
            "another process of this run has ended: {text}\n  → its message gives the reason; the same command continues"
        ).format(text=text.splitlines()[0][:160])
    if "Duplicate GPU detected" in text:
        return _(
            "two processes of this run use the same GPU\n  → start as many processes per machine as it has GPUs; CUDA_VISIBLE_DEVICES must show each process its own GPU, or all"
        )
    if is_disk_full(error):
        return _("the disk is full: {text}\n  → free some space, or --out on another disk").format(text=text)
    number = error.errno if isinstance(error, OSError) else None
    if number in (errno.EACCES, errno.EPERM, errno.EROFS):
        return _("permission denied: {text}\n  → choose another `out`").format(text=text)
    if is_disk_error(error):
        return _("the disk reports an error: {text}\n  → nothing committed is lost: the same command continues").format(
            text=text
        )
    return None
