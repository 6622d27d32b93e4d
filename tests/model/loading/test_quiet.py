"""While a model loads, progress bars and hints are suppressed; process-wide state is restored afterwards."""

from __future__ import annotations

import sys
import threading
import warnings

import pytest

from tongwen.model.loading.quiet import quiet


def test_concurrent_loads_restore_stderr_and_warnings(capsys: pytest.CaptureFixture[str]) -> None:
    before = (sys.stderr, list(warnings.filters))
    inside, leave = threading.Event(), threading.Event()

    def other() -> None:
        with quiet():
            inside.set()
            leave.wait()

    thread = threading.Thread(target=other)
    with quiet():
        thread.start()
        inside.wait()
    assert sys.stderr is not before[0], "the other is not done"
    leave.set()
    thread.join()
    assert (sys.stderr, list(warnings.filters)) == before


def test_only_progress_bars_are_suppressed(capsys: pytest.CaptureFixture[str]) -> None:
    with quiet():
        sys.stderr.write("\r  0%|   | 0/2\r 50%|#  | 1/2\r100%|## | 2/2\nTraceback: of another thread\n")
        warnings.warn("a hint", stacklevel=1)
    assert capsys.readouterr().err == "Traceback: of another thread\n"
