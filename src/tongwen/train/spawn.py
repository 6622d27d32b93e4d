"""Start the processes of a stage as torchrun does, and report a process that was killed."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from typing import Any

from tongwen.core import console, distributed
from tongwen.core.errors import MachineError
from tongwen.core.i18n import _


def main(arguments: Sequence[str]) -> int:
    """Run torchrun's command line. Return 0, 5 when a process was killed, else 1: that process has printed its error."""
    distributed.end_with_parent(signal.SIGTERM)  # it is passed on to the processes, which save
    os.environ[distributed.PARENT] = str(os.getpid())
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing import api
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    stop, received = api._terminate_process_handler, list[int]()

    def stop_once(number: int, frame: Any) -> None:
        """Pass on the first signal only: a second one would end the wait for processes that are saving."""
        received.append(number)
        if len(received) == 1:
            stop(number, frame)

    api._terminate_process_handler = stop_once
    try:
        run.run(run.parse_args(list(arguments)))
    except api.SignalException:
        return 1
    except ChildFailedError as error:
        killed = {
            rank: failure
            for rank, failure in error.failures.items()
            if failure.exitcode in (-signal.SIGKILL, -signal.SIGSEGV)
        }
        for rank, failure in killed.items():
            console.error(
                MachineError(
                    _("{signal} ended the process of rank {rank} ({pid}); the other processes were stopped").format(
                        rank=rank, pid=failure.pid, signal=failure.signal_name()
                    ),
                    remedy=_(
                        "the system kills processes that use too much memory (see dmesg); the same command continues"
                    ),
                ).text()
            )
        return MachineError.exit_code if killed else 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
