"""When a run is asked to stop: by a signal, or because its time is nearly over. It then saves at the end of the step.

A second signal, later than launchers repeat the first, ends the process at once; the last checkpoint stays whole.
"""

from __future__ import annotations

import os
import signal
import time

from tongwen.core.i18n import _

REPEATED = 3.0  # seconds in which the same wish may arrive twice: to the whole group, and passed on by a parent
SAVING_SECONDS = 30.0  # assumed until the first save has been seen


class ShutdownRequest:
    """Whether a run is to stop after this step; it knows how long steps and saves take.

    deadline: when the process must be gone, in seconds since 1970; None: never
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
        """Whether the first step will be the last one, for all that is known before it."""
        return self.deadline is not None and time.time() + 2 * self.save > self.deadline

    def on_signal(self, number: int) -> None:
        """Somebody asks. A second time, the process ends at once."""
        now = time.monotonic()
        if self.signalled_at is not None and now > self.signalled_at + REPEATED:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.reason, self.signalled_at = signal.Signals(number).name, self.signalled_at or now

    def should_stop(self) -> bool:
        """Whether to stop after the step that is being taken. Called once in each step."""
        now = time.time()
        self.step, self.began = max(self.step, now - self.began), now
        if not self.reason and self.deadline is not None and now + 2 * (self.step + self.save) > self.deadline:
            self.reason = _("the time limit is near")
        return bool(self.reason)

    def on_save(self, seconds: float) -> None:
        """A checkpoint took this long; no step does."""
        self.save, self.began = seconds, time.time()


def _end_of_job() -> float | None:
    """Slurm's own time limit, where it says it."""
    end = os.environ.get("SLURM_JOB_END_TIME", "")
    return float(end) if end.isdigit() else None
