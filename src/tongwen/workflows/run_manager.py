"""Start runs as separate processes, watch them through the files they write, stop them, and resume them.

All state is in the run's folder: the lock names the process, `run.log` has its output, `metrics.jsonl` its progress. A
watching page may therefore be closed and opened again.
"""

from __future__ import annotations

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

from tongwen.core import artifact, console, originals
from tongwen.core.errors import MachineError, RecipeError, TongwenError
from tongwen.core.i18n import _, language
from tongwen.recipe.load import load_recipe
from tongwen.train.metrics_file import read_metrics
from tongwen.workflows.run_lock import LOCK, lock_holder
from tongwen.workflows.stage_inputs import TRAINING

LOG = "run.log"
LOG_HEAD = b"$ tongwen run"  # begins the log
LOG_BYTES = 16_000  # bytes of the log that are shown
WAIT_SECONDS = 60.0  # for a run to take its lock, on a machine that has other work too


def start(arguments: Sequence[str], out: Path) -> None:
    """Start `tongwen run ARGUMENTS` in a new session, with its output in OUT/run.log. Returns when it holds the lock and has
    written its recipe.

    Raises MachineError if a run is in progress there, or if it ends at once (with its output).
    """
    if lock_holder(out):
        raise MachineError(_("this run is already in progress"), place=str(out))
    originals.check_output(out, inside=True)
    if out.exists() and not out.is_dir():
        raise RecipeError(_("this is not a folder"), place=str(out))
    if (out / LOG).exists() and not (out / LOCK).exists() and not (out / LOG).read_bytes().startswith(LOG_HEAD):
        raise RecipeError(
            _("this file is yours, and a run that the page starts writes its own here"), place=str(out / LOG)
        )
    out.mkdir(parents=True, exist_ok=True)
    with (out / LOG).open("ab") as log:
        log.write(LOG_HEAD + b" " + " ".join(arguments).encode("utf-8", "backslashreplace") + b"\n")
        log.flush()
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
    while not _has_begun(out, process.pid) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    if process.poll():
        output = (out / LOG).read_bytes()[log_start:].decode("utf-8", "replace").strip()
        raise MachineError(_("it ended immediately: {reason}").format(reason=output), place=str(out))


def _has_begun(out: Path, number: int) -> bool:
    return lock_holder(out) == number and (out / "recipe.yaml").is_file()


def stop(out: Path) -> None:
    """Ask a run to stop; a training saves a checkpoint first. Raises MachineError if none runs there."""
    running = lock_holder(out)
    if not running:
        raise MachineError(_("no training is running here"), place=str(out))
    with suppress(psutil.Error):
        psutil.Process(running).terminate()  # it passes the signal on to the processes it started


def resume(out: Path) -> None:
    """Continue a run with the recipe in its folder."""
    start([str(out / "recipe.yaml")], out)


def compare(outs: Sequence[Path]) -> str:
    """Return the page of `tongwen show RUN1 RUN2`. Raises MachineError with the command's error if it fails."""
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
    """Return (value, label) of the run's state and the latest metrics of its training."""
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
    """Return (title, points over steps, whether they are noisy) for loss, held-out score and learning rate."""
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
    """Return the end of the run's log."""
    file = out / LOG
    if not file.is_file():
        return ""
    with file.open("rb") as stream:
        stream.seek(max(0, file.stat().st_size - LOG_BYTES))
        return stream.read().decode("utf-8", "replace").lstrip("\ufffd")


def samples(out: Path) -> list[dict[str, str]]:
    """Return questions with their answers before and after, from the last finished training stage."""
    for stage in reversed(TRAINING):
        file = out / stage / "report.json"
        if file.is_file():
            return list(artifact.read_json(file).get("samples") or [])
    return []


def reports(out: Path) -> list[Path]:
    """Return the reports of finished stages; an unfinished stage's folder is about to be renamed."""
    return [file for file in sorted(out.glob("*/report.html")) if file.parent.suffix != ".partial"]


def _metrics(out: Path) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Yield (stage, lines of metrics.jsonl) of each training stage that has begun."""
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
    return _("finished") if is_finished(out) else _("stopped")


def is_finished(out: Path) -> bool:
    """Return whether every stage of the run's recipe is finished."""
    try:
        recipe, _unused = load_recipe(out / "recipe.yaml")
        return all(artifact.find(out / stage) for stage in recipe.stages)
    except TongwenError:
        return False


def _memory(running: int) -> int:
    """Return the resident bytes of a process and its children."""
    total = 0
    with suppress(psutil.Error):
        process = psutil.Process(running)
        for one in (process, *process.children(recursive=True)):
            with suppress(psutil.Error):
                total += one.memory_info().rss
    return total
