"""Signals that ask a command to stop: SIGTERM (Slurm, torchrun), SIGHUP (a closed terminal), SIGUSR1 (`sbatch --signal=USR1@300`).

`main` installs a handler before it imports anything else, so this module imports little.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

STOP_SIGNALS = [signal.Signals[name] for name in ("SIGTERM", "SIGHUP", "SIGUSR1") if hasattr(signal, name)]
REPEATED = 3.0  # seconds in which one signal may arrive twice: sent to the process group, and forwarded by a parent


class StopSignal(KeyboardInterrupt):
    """A stop signal ends the command as Ctrl-C does, and also where Ctrl-C only stops an answer."""

    def __init__(self, number: int) -> None:
        self.number = number
        super().__init__(signal.Signals(number).name)


@contextmanager
def on_stop_signals(handler: Callable[[int], object]) -> Iterator[None]:
    """Call `handler` with the number of each stop signal that arrives inside the block.

    An ignored signal stays ignored, as `nohup` asks. Only the main thread can handle signals; in others this does nothing.
    """
    previous = {}
    if threading.current_thread() is threading.main_thread():
        for one in STOP_SIGNALS:
            if signal.getsignal(one) is not signal.SIG_IGN:
                previous[one] = signal.signal(one, lambda number, frame: handler(number))
    try:
        yield
    finally:
        for one, old_handler in previous.items():
            signal.signal(one, old_handler)


@contextmanager
def raise_on_stop_signals() -> Iterator[None]:
    """Raise StopSignal for a stop signal that arrives inside the block. A repeated signal does not disturb what saves."""
    raised_at = -REPEATED

    def interrupt(number: int) -> None:
        nonlocal raised_at
        if (now := time.monotonic()) > raised_at + REPEATED:
            raised_at = now
            raise StopSignal(number)

    with on_stop_signals(interrupt):
        yield
