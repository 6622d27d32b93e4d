"""Stop signals: raised once inside a block, and an ignored one stays ignored."""

from __future__ import annotations

import os
import signal
import threading

import pytest

from tongwen.core import stop_signals
from tongwen.core.stop_signals import STOP_SIGNALS, StopSignal, raise_on_stop_signals


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_stop_signal_is_raised_once(number: signal.Signals, monkeypatch: pytest.MonkeyPatch) -> None:
    under_nohup = signal.signal(number, signal.SIG_DFL)  # nohup ignores SIGHUP
    before = signal.getsignal(number)
    with raise_on_stop_signals():
        with pytest.raises(StopSignal, match=number.name) as caught:
            os.kill(os.getpid(), number)
        assert caught.value.number == number and isinstance(caught.value, KeyboardInterrupt)
        os.kill(os.getpid(), number)  # what saves is not disturbed
        monkeypatch.setattr(stop_signals, "REPEATED", 0.0)
        with pytest.raises(StopSignal):
            os.kill(os.getpid(), number)
    assert signal.getsignal(number) == before
    signal.signal(number, under_nohup)


def test_ignored_signal_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with raise_on_stop_signals():
            os.kill(os.getpid(), signal.SIGHUP)
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_threads_leave_the_signals_alone() -> None:
    entered = []

    def enter() -> None:
        with raise_on_stop_signals():
            entered.append(signal.getsignal(signal.SIGTERM))

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert entered == [before]
