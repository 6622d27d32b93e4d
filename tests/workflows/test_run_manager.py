"""A run that the page starts outlives it, stops on request and resumes bit-identically."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import dialogues, tensors, write_recipe
from tongwen.core.errors import MachineError
from tongwen.workflows import run_manager
from tongwen.workflows.run_lock import LOCK, lock_folder, lock_holder

SAVING = ", save_every: 4"


def wait_for(what: Callable[[], Any], seconds: float = 300) -> Any:
    ends = time.monotonic() + seconds
    while not (found := what()) and time.monotonic() < ends:
        time.sleep(0.05)
    assert found, "waited in vain"
    return found


def steps(out: Path) -> int:
    return len(curve[0][1]) if (curve := run_manager.curves(out)) else 0


@pytest.mark.sample()
def test_stopped_run_resumes_to_the_same_weights(chat_model: Path, tmp_path: Path) -> None:
    for name in ("never", "once"):
        write_recipe(tmp_path / name, chat_model, dialogues(60), sft=SAVING)
    never, once = tmp_path / "never" / "out", tmp_path / "once" / "out"
    terminal = [sys.executable, "-m", "tongwen", "run", str(never.parent / "recipe.yaml")]
    assert subprocess.run(terminal, capture_output=True, check=False).returncode == 0
    # The page's server is a process of its own here, and is gone before the run has ended.
    code = "import sys; from pathlib import Path; from tongwen.workflows import run_manager; run_manager.start(sys.argv[1:2], Path(sys.argv[2]))"
    subprocess.run([sys.executable, "-c", code, str(once.parent / "recipe.yaml"), str(once)], check=True)
    assert lock_holder(once)
    wait_for(lambda: steps(once) > 5)
    with pytest.raises(MachineError, match="this run is already in progress"):
        run_manager.resume(once)
    assert dict(map(reversed, run_manager.facts(once)))["current memory"]
    run_manager.stop(once)
    wait_for(lambda: not lock_holder(once))
    assert run_manager.facts(once)[0][0] == "stopped" and not (once / "sft").exists()
    with pytest.raises(MachineError, match="no training is running here"):
        run_manager.stop(once)
    run_manager.resume(once)
    wait_for(lambda: not lock_holder(once))
    assert run_manager.facts(once)[0][0] == "finished", run_manager.log(once)
    for stage in ("sft", "merge"):
        left, right = tensors(never / stage), tensors(once / stage)
        assert left.keys() == right.keys()
        assert all(torch.equal(left[name], right[name]) for name in left)
    assert run_manager.samples(once) and [file.parent.name for file in run_manager.reports(once)] == ["sft"]
    assert "held-out bits per byte" in run_manager.log(once)
    page = run_manager.compare([never, once])
    assert "<svg" in page and "never" in page and "once" in page
    with pytest.raises(MachineError, match="no training has finished here"):
        run_manager.compare([never, tmp_path])


def test_run_that_cannot_start_reports_why(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("name: x\nbase: y\nsft: {learning_rat: 1}\n", encoding="utf-8")
    with pytest.raises(MachineError, match="learning_rate"):
        run_manager.start([str(recipe)], tmp_path / "out")


@pytest.mark.parametrize(
    "left",
    ["", "x", "here, process one, since", "{here}, process {dead}, since", "{here}, process {young}, since"],
)
def test_lock_of_a_killed_run_is_released(left: str, tmp_path: Path) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True, check=True
    )
    here = platform.node()
    text = left.format(here=here, dead=ended.stdout.strip(), young=os.getpid())
    (tmp_path / LOCK).write_text(text, encoding="utf-8")
    os.utime(tmp_path / LOCK, (1e9, 1e9))  # long before any process of today began
    assert lock_holder(tmp_path) is None


HOLD = "import sys; from pathlib import Path; from tongwen.workflows.run_lock import lock_folder\nwith lock_folder(Path(sys.argv[1])): print('held', flush=True); input()"


@pytest.mark.skipif(sys.platform != "linux", reason="Linux lists who took a lock")
def test_process_id_in_a_lock_must_be_that_of_its_holder(tmp_path: Path) -> None:
    """Stop ends the holder of a lock, and nobody else: neither with a text from elsewhere, nor beside somebody's lock."""
    stranger = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"])
    try:
        text = f"{platform.node()}, process {stranger.pid}, since now"
        (tmp_path / LOCK).write_text(text, encoding="utf-8")
        os.utime(tmp_path / LOCK, (time.time() + 3600,) * 2)
        assert lock_holder(tmp_path) is None
        with pytest.raises(MachineError, match="no training is running here"):
            run_manager.stop(tmp_path)
        holder = subprocess.Popen(
            [sys.executable, "-c", HOLD, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert holder.stdout and holder.stdout.readline() == "held\n"
        assert lock_holder(tmp_path) == holder.pid
        (tmp_path / LOCK).write_text(text, encoding="utf-8")
        os.utime(tmp_path / LOCK, (time.time() + 3600,) * 2)
        assert lock_holder(tmp_path) is None, "somebody holds it, but not the one who is named"
        holder.communicate("\n")
        assert stranger.poll() is None
    finally:
        stranger.kill()
        stranger.wait()


def test_reading_a_lock_does_not_block_a_run(tmp_path: Path) -> None:
    (tmp_path / LOCK).write_text(f"{platform.node()}, process 1, since", encoding="utf-8")
    looking = True

    def look() -> None:
        while looking:
            lock_holder(tmp_path)

    thread = threading.Thread(target=look)
    thread.start()
    try:
        for _ in range(50):
            with lock_folder(tmp_path):
                pass
    finally:
        looking = False
        thread.join()
