"""Runs from outside: started as processes of their own, watched by what they write, asked to stop, taken up again.

Nothing is remembered but what lies in the run's folder: the lock says who runs, `run.log` what was said, `metrics.jsonl`
how it goes. So whoever watches may go away and come back.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from tongwen.core import artifact, console
from tongwen.core.errors import MachineError, TongwenError
from tongwen.core.i18n import _, language
from tongwen.recipe.load import load_recipe
from tongwen.train.metrics_file import read_metrics
from tongwen.workflows.run_lock import lock_holder
from tongwen.workflows.stage_inputs import TRAINING

LOG = "run.log"
TAIL = 16_000  # bytes of it that are shown
WAIT_SECONDS = 60.0  # for a run to take its lock, on a machine that has other work too


def start(arguments: Sequence[str], out: Path) -> None:
    """`tongwen run ARGUMENTS` in a session of its own, its words in OUT/run.log. Returns when it has begun.

    Raises MachineError when one runs there already, or when it ends before it has begun, with what it said.
    """
    if lock_holder(out):
        raise MachineError(_("this run is already in progress"), place=str(out))
    out.mkdir(parents=True, exist_ok=True)
    with (out / LOG).open("ab") as log:
        log_start = log.tell()
        process = subprocess.Popen(  # noqa: S603
            [sys.executable, "-m", "tongwen", "run", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={**os.environ, "PYTHONUNBUFFERED": "1", "COLUMNS": "100", "TONGWEN_LANG": language()},
        )
    deadline = time.monotonic() + WAIT_SECONDS
    while lock_holder(out) != process.pid and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    if process.poll():
        output = (out / LOG).read_bytes()[log_start:].decode("utf-8", "replace").strip()
        raise MachineError(_("it ended immediately: {said}").format(said=output), place=str(out))


def stop(out: Path) -> None:
    """Ask a run to end; one that trains saves first. Raises MachineError when none runs there."""
    running = lock_holder(out)
    if not running:
        raise MachineError(_("no training is running here"), place=str(out))
    with suppress(psutil.Error):
        psutil.Process(running).terminate()  # it passes that on to the processes that it waits for


def resume(out: Path) -> None:
    """Go on with a run by the recipe that stands in its folder."""
    start([str(out / "recipe.yaml")], out)


def compare(outs: Sequence[Path]) -> str:
    """The page of `tongwen show RUN1 RUN2`. Raises MachineError with what the command says when there is none."""
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder) / "compared.html"
        done = subprocess.run(  # noqa: S603
            [sys.executable, "-m", "tongwen", "show", *map(str, outs), "--html", str(page)],
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "TONGWEN_LANG": language()},
        )
        if not page.is_file():
            raise MachineError(done.stderr.strip() or _("this needs two runs"))
        return page.read_text(encoding="utf-8")


def facts(out: Path) -> list[tuple[str, str]]:
    """(value, label): how it stands, and the last figures of what trains."""
    running = lock_holder(out)
    rows = [(_state(out, running), _("state"))]
    stage, lines = next(reversed([*_metrics(out)]), ("", []))
    if lines:
        last = lines[-1]
        rows += [
            (f"{last['step']}", _("step of {stage}").format(stage=stage)),
            (f"{last['loss']:.3f}", _("loss")),
            (f"{last['learning_rate'] or 0:.2e}", _("learning rate")),
            (console.human_count(round(last["tokens_per_second"])), _("tokens per second")),
            (console.human_time(last["seconds"]), _("training time")),
        ]
    if running:
        rows.append((console.human_bytes(_memory(running)), _("current memory")))
    return rows


def curves(out: Path) -> list[tuple[str, list[tuple[float, float]], bool]]:
    """(title, points over steps, whether they scatter) of the loss, what is held out, and the learning rate."""
    names = {
        "loss": _("loss"),
        "bits_per_byte": _("held-out bits per byte"),
        "learning_rate": _("learning rate"),
    }
    found = []
    for stage, lines in _metrics(out):
        for key, name in names.items():
            points = [(float(line["step"]), float(line[key])) for line in lines if line.get(key) is not None]
            if len(points) > 1:
                found.append((f"{stage} · {name}", points, key == "loss"))
    return found


def log(out: Path) -> str:
    """Its last words."""
    file = out / LOG
    if not file.is_file():
        return ""
    with file.open("rb") as stream:
        stream.seek(max(0, file.stat().st_size - TAIL))
        return stream.read().decode("utf-8", "replace").lstrip("\ufffd")


def samples(out: Path) -> list[dict[str, str]]:
    """Questions with their answers before and after, of the last training stage that has finished."""
    for stage in reversed(TRAINING):
        file = out / stage / "report.json"
        if file.is_file():
            return list(json.loads(file.read_text(encoding="utf-8")).get("samples") or [])
    return []


def reports(out: Path) -> list[Path]:
    """Of the stages that have finished; what is unfinished has another name in a moment."""
    return [file for file in sorted(out.glob("*/report.html")) if file.parent.suffix != ".partial"]


def _metrics(out: Path) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """(stage, lines of metrics.jsonl) of each training stage that has begun."""
    for stage in TRAINING:
        for folder in (out / stage, artifact.partial_of(out / stage)):
            if lines := read_metrics(folder / "metrics.jsonl"):
                yield stage, lines
                break


def _state(out: Path, running: int | None) -> str:
    if running:
        under_way = sorted(out.glob("*.partial"), key=lambda folder: folder.stat().st_mtime)
        stage = under_way[-1].name.removesuffix(".partial") if under_way else ""
        return _("running {stage}").format(stage=stage).strip()
    try:
        recipe, _unused = load_recipe(out / "recipe.yaml")
        finished = all(artifact.find(out / stage) for stage in recipe.stages)
    except TongwenError:
        finished = False
    return _("finished") if finished else _("stopped")


def _memory(running: int) -> int:
    """Resident bytes of a process and its children."""
    total = 0
    with suppress(psutil.Error):
        process = psutil.Process(running)
        for one in (process, *process.children(recursive=True)):
            with suppress(psutil.Error):
                total += one.memory_info().rss
    return total
