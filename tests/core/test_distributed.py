"""Launched processes end with the process that waits for them, and never outnumber what the machine can run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.conftest import dialogues, write_rows
from tongwen.core import distributed

# A command, the launcher that it starts, and the launcher's two ranks: each as `torchrun`, `spawn` and `main` begin.
LEAF = (
    "import signal, time; from tongwen.core import distributed as d; d.end_with_parent(signal.SIGKILL); time.sleep(300)"
)
MIDDLE = f"""
import os, signal, subprocess, sys, time
from tongwen.core import distributed as d
d.end_with_parent(signal.SIGTERM)
signal.signal(signal.SIGTERM, signal.SIG_IGN)  # busy with saving
os.environ[d.PARENT] = str(os.getpid())
ranks = [subprocess.Popen([sys.executable, "-c", {LEAF!r}], start_new_session=True) for _ in range(2)]
print(os.getpid(), *(rank.pid for rank in ranks), flush=True)
time.sleep(300)
"""
TOP = f"""
import os, subprocess, sys
from tongwen.core import distributed as d
os.environ[d.PARENT] = str(os.getpid())
subprocess.run([sys.executable, "-c", {MIDDLE!r}])
"""


def lives(process: psutil.Process) -> bool:
    try:
        return process.status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    except psutil.NoSuchProcess:
        return False


@pytest.mark.skipif(os.name == "nt", reason="signals")
@pytest.mark.parametrize("kernel", [True, False], ids=["kernel", "thread"])
@pytest.mark.parametrize("killed", ["command", "launcher"])
def test_no_process_outlives_the_one_that_waits_for_it(killed: str, kernel: bool, tmp_path: Path) -> None:
    """Also on a system where the kernel sends no signal: the thread that watches is enough."""
    elsewhere = "" if kernel else "import sys; sys.platform = 'other'\n"
    (tmp_path / "sitecustomize.py").write_text(elsewhere)
    path = os.pathsep.join([str(tmp_path), *sys.path])
    command = subprocess.Popen(
        [sys.executable, "-c", TOP], stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": path}
    )
    assert command.stdout
    launcher, *ranks = [psutil.Process(int(number)) for number in command.stdout.readline().split()]
    time.sleep(1)  # the ranks have begun
    assert all(one.is_running() for one in (launcher, *ranks)) and len(ranks) == 2
    (command if killed == "command" else launcher).send_signal(signal.SIGKILL)
    ends = time.monotonic() + 5
    while any(lives(one) for one in (launcher, *ranks)) and time.monotonic() < ends:
        time.sleep(0.1)
    left = [one for one in (launcher, *ranks) if lives(one)]
    for one in left:
        one.kill()
    command.kill()
    command.wait(timeout=10)
    assert not left


def test_process_without_a_launcher_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(distributed.PARENT, raising=False)
    monkeypatch.setattr(distributed.threading, "Thread", lambda *words, **more: pytest.fail("nobody waits for it"))
    distributed.end_with_parent(signal.SIGKILL)


@pytest.mark.parametrize(
    ("cores", "memory", "most"), [(2, 24e9, 8), (2, 1e9, 2), (64, 512e9, 64), (64, 4.1e9, 10), (1, 1e8, 1)]
)
def test_most_processes_depends_on_cores_and_memory(
    cores: int, memory: float, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(cores)), raising=False)
    monkeypatch.setattr(os, "sysconf", lambda name: 4096 if name == "SC_PAGE_SIZE" else int(memory) // 4096)
    monkeypatch.setattr(distributed, "_gpu_files", lambda: [])
    assert distributed.most_processes() == most
    monkeypatch.setattr(distributed, "_gpu_files", lambda: [Path("/dev/nvidia0")] * 80)
    assert distributed.most_processes() == min(80, max(1, int(memory) // distributed.PROCESS_BYTES))


@pytest.mark.parametrize("devices", [100, 10**6])
def test_too_many_processes_are_refused(
    devices: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tongwen: Any, chat_model: Path
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1}, raising=False)
    monkeypatch.setattr(distributed, "torchrun", lambda *words: pytest.fail("no process may start"))
    data = write_rows(tmp_path / "d.jsonl", dialogues(20))
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        f"name: t\nbase: {chat_model}\nout: {tmp_path}/o\ndevices: {devices}\n"
        f"prepare: {{dialogues: {data}, held_out: 2}}\nsft: {{template: chatml, stop_after: 2 steps}}\n"
    )
    for command in ("check", "run"):
        code, _, err = tongwen(command, recipe)
        assert code == 5 and f"devices: {devices}" in err, err
    assert tongwen("run", recipe, "--until", "prepare")[0] == 0, "only training needs them"
