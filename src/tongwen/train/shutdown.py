"""Stop a run on a signal or near its time limit; it saves at the end of the step.

A second signal, later than launchers repeat the first, ends the process at once; the last checkpoint stays intact.
"""

from __future__ import annotations

import os
import signal
import time

from tongwen.core.i18n import _
from tongwen.core.stop_signals import REPEATED

SAVING_SECONDS = 30.0  # assumed until the first save is measured


class ShutdownRequest:
    """Decide whether a run must stop after this step, from signals and the time that steps and saves take.

    deadline: when the process must have ended, in seconds since 1970; None: never
    """

    def __init__(self, deadline: float | None) -> None:
        self.deadline = min(filter(None, (deadline, _end_of_job())), default=None)
        self.reason = ""
        self.signalled_at: float | None = None
        self.step = 0.0
        self.save = SAVING_SECONDS
        self.began = time.time()

    @property
    def is_short(self) -> bool:
        """Whether there is probably only time for one step."""
        return self.deadline is not None and time.time() + 2 * self.save > self.deadline

    def on_signal(self, number: int) -> None:
        """Note a stop signal; a second one ends the process at once."""
        now = time.monotonic()
        if self.signalled_at is not None and now > self.signalled_at + REPEATED:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.reason, self.signalled_at = signal.Signals(number).name, self.signalled_at or now

    def should_stop(self) -> bool:
        """Return whether to stop after the current step. Call it once per step."""
        now = time.time()
        self.step, self.began = max(self.step, now - self.began), now
        if not self.reason and self.deadline is not None and now + 2 * (self.step + self.save) > self.deadline:
            self.reason = _("the time limit is near")
        return bool(self.reason)

    def on_save(self, seconds: float) -> None:
        """Note how long a checkpoint took; that time does not count as a step's."""
        self.save, self.began = seconds, time.time()


def _end_of_job() -> float | None:
    """Return the end time of the Slurm job, if Slurm sets it."""
    end = os.environ.get("SLURM_JOB_END_TIME", "")
    return float(end) if end.isdigit() else None
