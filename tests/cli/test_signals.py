"""A stop signal ends any command with 130 and one line, also during its imports; servers drain and end with 0 on SIGTERM."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tongwen.commands import serve
from tongwen.core.stop_signals import STOP_SIGNALS, StopSignal
from tongwen.serving import auth


@pytest.fixture(autouse=True)
def _hangup_is_not_ignored() -> Iterator[None]:
    """The tests may run under nohup, and a child inherits what is ignored."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


AT_IMPORT = """
import os, sys
class Finder:
    def find_spec(self, name, *_):
        if name == {module!r}:
            os.kill(os.getpid(), {number})
sys.meta_path.insert(0, Finder())
from tongwen.cli.main import main
sys.exit(main(["check", "none.yaml"]))
"""


def check(module: str, number: int, **options: Any) -> tuple[int, str]:
    """`tongwen check` of a missing recipe in a process that gets the signal while it imports the module."""
    command = [sys.executable, "-c", AT_IMPORT.format(module=module, number=int(number))]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", timeout=60, check=False, **options)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("module", "number"), list(zip(["tongwen.cli.parser", "numpy.linalg", "rich.console"], STOP_SIGNALS, strict=True))
)
def test_signal_during_the_imports_ends_with_130_and_one_line(module: str, number: int) -> None:
    assert check(module, number) == (130, "✗ interrupted; the same command continues\n")


def test_nohup_keeps_a_command_running() -> None:
    code, said = check("numpy", signal.SIGHUP, preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    assert code == 2 and "none.yaml" in said


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGHUP, 130), (signal.SIGUSR1, 130)])
def test_server_loading_its_model_ends_on_a_signal(
    number: int, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tongwen: Any
) -> None:
    monkeypatch.setattr(serve, "open_chat_model", lambda *_, **__: os.kill(os.getpid(), number))
    assert tongwen("serve", tmp_path, "--port", 0)[0] == code


async def slow_app(scope: Any, receive: Any, send: Any) -> None:
    await asyncio.sleep(0.5)
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"whole"})


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
def test_server_finishes_running_answers_on_a_signal(number: signal.Signals) -> None:
    answers: list[bytes] = []
    with auth.open_port("127.0.0.1", 0) as listening:
        url = f"http://127.0.0.1:{listening.getsockname()[1]}/"
        asking = threading.Thread(target=lambda: answers.append(urllib.request.urlopen(url, timeout=20).read()))

        def stop() -> None:
            asking.start()
            time.sleep(0.3)
            os.kill(os.getpid(), number)

        stopping = threading.Timer(0.2, stop)
        stopping.start()
        serving: Callable[[], None] = lambda: auth.serve(slow_app, listening)  # noqa: E731
        if number == signal.SIGTERM:
            serving()
        else:
            with pytest.raises(StopSignal):
                serving()
        asking.join()
    assert answers == [b"whole"]


async def endless_app(scope: Any, receive: Any, send: Any) -> None:
    """An answer that lasts as long as its client."""
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"x", "more_body": True})
    while (await receive())["type"] != "http.disconnect":
        pass


async def page_app(scope: Any, receive: Any, send: Any) -> None:
    """A page that was loaded, whose connection stays open."""
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"1")]})
    await send({"type": "http.response.body", "body": b"x"})


@pytest.mark.parametrize(("app", "drain", "most"), [(page_app, 30, 20), (endless_app, 1, 60)])
def test_open_page_does_not_hold_up_the_end(
    app: Any, drain: int, most: float, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """An open page ends at once; an answer ends after the time for answers, without a traceback."""
    monkeypatch.setattr(auth, "DRAIN_SECONDS", drain)
    began = time.monotonic()
    with auth.open_port("127.0.0.1", 0) as listening:

        def stop() -> None:
            with socket.create_connection(("127.0.0.1", listening.getsockname()[1])) as page:
                page.sendall(b"GET /open HTTP/1.1\r\nHost: x\r\n\r\n")
                assert page.recv(1)
                os.kill(os.getpid(), signal.SIGTERM)
                while page.recv(100):
                    pass

        timer = threading.Timer(0.2, stop)
        timer.start()
        auth.serve(app, listening)
        timer.join()
    assert time.monotonic() - began < most
    assert "Traceback" not in capfd.readouterr().err
