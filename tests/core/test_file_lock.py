"""Only one command writes one output."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from tongwen.cli import parser
from tongwen.commands import generate
from tongwen.core import file_lock
from tongwen.core.errors import MachineError
from tongwen.core.file_lock import lock_output


def test_second_process_is_refused_and_the_holder_is_named(tmp_path: Path) -> None:
    out = tmp_path / "new" / "out"
    with lock_output(out):
        with pytest.raises(MachineError, match=rf"process {os.getpid()}, since .*\n.*another --out"), lock_output(out):
            raise AssertionError("locked twice")
        with lock_output(tmp_path / "new" / "other"):
            pass
    assert list((tmp_path / "new").iterdir()) == []
    with lock_output(out), lock_output("/"):
        pass


def test_killed_holder_leaves_no_lock(tmp_path: Path) -> None:
    child = os.fork()
    if not child:
        with lock_output(tmp_path / "out"):
            (tmp_path / "held").touch()
            time.sleep(60)
    while not (tmp_path / "held").exists():
        time.sleep(0.01)
    with pytest.raises(MachineError, match=f"process {child}"), lock_output(tmp_path / "out"):
        raise AssertionError("locked twice")
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    with lock_output(tmp_path / "out"):
        pass


def test_lock_removed_by_its_holder_is_not_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fcntl

    file, flock = tmp_path / "out.lock", fcntl.flock

    def after_removal(stream: Any, operation: int) -> None:
        file.unlink()
        flock(stream, operation)

    monkeypatch.setattr(fcntl, "flock", after_removal)
    with pytest.raises(MachineError), file_lock.hold(file, "out", ""):
        raise AssertionError("holds a file that another process cannot see")


@pytest.mark.parametrize(
    "line",
    [
        "generate --model m --prompts p --out OUT --again",
        "convert m --to hf --out OUT --again",
        "merge --base b --adapter a --out OUT --again",
        "evaluate --model m --task perplexity --out OUT",
        "tokenizer merge --base b --add a --out OUT --again",
    ],
)
def test_commands_that_write_one_output_are_refused_before_they_touch_it(
    line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tongwen: Any
) -> None:
    out = tmp_path / "out"
    out.write_text("an earlier result")
    with lock_output(out):
        code, _, err = tongwen(*line.replace("OUT", str(out)).split())
        assert code == 5 and f"process {os.getpid()}" in err
    assert out.read_text() == "an earlier result" and list(tmp_path.iterdir()) == [out]
    assert parser.parse(line.replace("OUT", str(out)).split()).writes


def test_lock_is_held_while_the_command_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tongwen: Any) -> None:
    def run(*arguments: Any, **options: Any) -> int:
        return 0 if (tmp_path / "o.lock").read_text().startswith(os.uname().nodename) else 1

    monkeypatch.setattr(generate, "run", run)
    assert tongwen("generate", "--model", "m", "--prompts", "p", "--out", tmp_path / "o")[0] == 0
    assert not list(tmp_path.iterdir())
