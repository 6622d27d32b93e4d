"""While a model opens, libraries' bars and hints are set aside; what belongs to the process is put back, whoever leaves last."""

from __future__ import annotations

import sys
import threading
import warnings

import pytest

from tongwen.model.loading.load import quiet


def test_two_that_open_at_once_put_back_what_was_there(capsys: pytest.CaptureFixture[str]) -> None:
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


def test_bars_are_kept_out_of_a_log_and_nothing_else(capsys: pytest.CaptureFixture[str]) -> None:
    with quiet():
        sys.stderr.write("\r  0%|   | 0/2\r 50%|#  | 1/2\r100%|## | 2/2\nTraceback: of another thread\n")
        warnings.warn("a hint", stacklevel=1)
    assert capsys.readouterr().err == "Traceback: of another thread\n"
