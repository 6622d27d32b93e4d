"""Run the steps of data preparation as tasks: in this process, or on many machines with datatrove's executors.

datatrove provides ranks, logs, Slurm job arrays and Ray. The steps are ours and the same everywhere. They pass their
results as files, so a task needs only a folder that all machines share.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tongwen.core import artifact, console
from tongwen.core.errors import MachineError, MissingPackage, TongwenError
from tongwen.core.i18n import _
from tongwen.data.input_parts import InputPart
from tongwen.recipe.data import Prepare

DONE = {"scan": "scan.json", "settle": "settled.json"}


def run_tasks(
    section: Prepare, step: str, out: Path, parts: Sequence[InputPart], work: Callable[[InputPart], None]
) -> None:
    """Run a step on every part. Raises the error of a part; with an executor, MachineError when a task has failed."""
    if section.executor == "here":
        for number, part in enumerate(parts, 1):
            with console.waiting(f"{step} {number}/{len(parts)} {part.name}"):
                work(part)
        return
    try:
        from datatrove.executor import LocalPipelineExecutor, RayPipelineExecutor, SlurmPipelineExecutor
    except ImportError:
        raise MissingPackage("datatrove", f"executor: {section.executor}", "datatrove") from None

    def task(data: Any, rank: int = 0, world_size: int = 1) -> Any:
        for part in parts[rank::world_size]:
            try:
                work(part)
            except TongwenError as error:  # the first process reports it and returns its exit code
                found = {"code": error.exit_code, "rule": error.rule, "place": error.place, "remedy": error.remedy}
                artifact.write_json(_error_file(out, step, part), found)
        return data or ()

    kinds = {"local": LocalPipelineExecutor, "slurm": SlurmPipelineExecutor, "ray": RayPipelineExecutor}
    options = {"tasks": section.tasks, "logging_dir": str(out / "parts" / f"logs-{step}"), "skip_completed": False}
    if section.executor == "local":
        options["workers"] = section.tasks
    kinds[section.executor](pipeline=[task], **options, **section.executor_options).run()
    _wait(section, step, out, parts)


def _wait(section: Prepare, step: str, out: Path, parts: Sequence[InputPart]) -> None:
    """Wait until every part is done. Slurm returns when the job is queued, and a task that died reports nothing."""
    while True:
        for part in parts:
            if (file := _error_file(out, step, part)).is_file():
                found = json.loads(file.read_text(encoding="utf-8"))
                file.unlink()
                error = TongwenError(found["rule"], place=found["place"], remedy=found["remedy"])
                error.exit_code = found["code"]
                raise error
        undone = [part for part in parts if not (part.folder(out) / DONE[step]).is_file()]
        if not undone:
            return
        if section.executor != "slurm":
            raise MachineError(
                _("{count} files were not finished").format(count=len(undone)),
                place=undone[0].name,
                remedy=_("see the logs in {out}; the same command continues").format(out=out / "parts"),
            )
        time.sleep(5)


def _error_file(out: Path, step: str, part: InputPart) -> Path:
    return out / "parts" / f"{part.index:05d}.{step}.error.json"
