"""compare: show several runs side by side: differing settings, results, and their curves in one drawing."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from tongwen.core import artifact, console, originals
from tongwen.core.console import human_bytes, human_time
from tongwen.core.errors import ArtifactError, RecipeError, first_line
from tongwen.core.html import curves, render
from tongwen.core.i18n import _
from tongwen.train.metrics_file import read_metrics
from tongwen.workflows.stage_inputs import TRAINING


@dataclass(frozen=True)
class TrainedRun:
    """A finished training stage. name: distinguishes it from the others."""

    name: str
    artifact: artifact.Artifact
    report: dict[str, Any]
    metrics: list[dict[str, Any]]

    @property
    def settings(self) -> dict[str, Any]:
        """Settings by dotted name, and the fingerprint of the prepared data."""
        parents = self.artifact.manifest["parents"]
        prepared = {"prepare (fingerprint)": parents["prepare"]["fingerprint"][:12]}
        return _flat(self.artifact.manifest["settings"]) | _flat(self.artifact.manifest.get("free", {})) | prepared

    @property
    def results(self) -> dict[str, str]:
        held_out, throughput = (self.report["held_out"] or {}).get("bits_per_byte"), self.report["throughput"]
        last = [line["loss"] for line in self.metrics if "loss" in line][-10:]
        return {
            _("held-out bits per byte, before"): f"{held_out['before']:.4f}" if held_out else "",
            _("held-out bits per byte, after"): f"{held_out['after']:.4f}" if held_out else "",
            _("loss, mean of the last ten lines"): f"{sum(last) / len(last):.4f}" if last else "",
            _("trained parameters"): f"{self.report['trainable']['parameters']:,}",
            _("steps"): f"{throughput['steps']:,}",
            "token": f"{throughput['tokens']:,}",
            _("tokens per second"): f"{throughput['tokens_per_second']:.0f}",
            _("time"): human_time(throughput["seconds"]),
            _("peak memory"): human_bytes(self.report["peak_memory_bytes"]),
        }


def run(paths: Sequence[str], html: str) -> int:
    """Compare the runs' training stages of the same kind; write them to an HTML page if one is named."""
    if html and not Path(html).absolute().parent.is_dir():
        raise RecipeError(_("there is no such folder"), place=html)
    found: dict[str, list[TrainedRun]] = {}
    for path, name in zip(paths, _names(paths), strict=True):
        for one in _trained(path, name):
            runs = found.setdefault(one.artifact.kind, [])
            if any(one.artifact.path.samefile(other.artifact.path) for other in runs):
                raise RecipeError(_("this run is named twice"), place=path)
            runs.append(one)
    kinds = []
    for kind, runs in found.items():
        names = [one.name for one in runs]
        differing = _rows([one.settings for one in runs], only_differing=True)
        results = _rows([one.results for one in runs], only_differing=False)
        console.header("compare", kind)
        tables = []
        for title, rows in ((_("settings"), differing), (_("results"), results)):
            console.table((title, *names), rows)
            tables.append((f"{kind} · {title}", (("", *names), rows)))
        kinds.append({"tables": tables, "curves": _curves(kind, runs)})
    if html:
        title = _("Runs compared")
        page = render("commands/compare.html.jinja", title=title, summary=" · ".join(paths), kinds=kinds)
        originals.write_sealed(Path(html), page, originals.HTML, paths)
        console.success(html)
    console.emit(
        {
            kind: {one.name: {"settings": one.settings, "report": one.report} for one in runs}
            for kind, runs in found.items()
        }
    )
    return 0


def _names(paths: Sequence[str]) -> list[str]:
    """Return the paths without their common parent."""
    absolute = [os.path.abspath(path) for path in paths]  # noqa: PTH100 (a link keeps the name that the user gave)
    shared = os.path.commonpath(absolute)
    return [os.path.relpath(path, shared) for path in absolute]


def _trained(path: str, name: str) -> list[TrainedRun]:
    """Return the finished training stages of a run, or of this stage's own folder. Raises ArtifactError if there is none."""
    folders = [folder for folder in (Path(path), *(Path(path) / stage for stage in TRAINING)) if folder.is_dir()]
    finished = [one for one in map(artifact.find, folders) if one and one.kind in TRAINING]
    if not finished:
        raise ArtifactError(
            _("no training has finished here"),
            place=path,
            remedy=_("give the folder of a run, or of its pretrain or sft"),
        )
    return [TrainedRun(name, one, _report(one.path), read_metrics(one.path / "metrics.jsonl")) for one in finished]


def _report(stage: Path) -> dict[str, Any]:
    """Return the content of report.json. Raises ArtifactError if it is damaged or incomplete."""
    file = stage / "report.json"
    try:
        report = dict(json.loads(file.read_text(encoding="utf-8")))
        lacks = {"held_out", "throughput", "trainable", "peak_memory_bytes"} - {*report}
        problem = _("it lacks {missing}").format(missing=_(", ").join(sorted(lacks))) if lacks else ""
    except (OSError, ValueError, TypeError) as error:
        problem = _("it cannot be read: {error}").format(error=first_line(error))
    if problem:
        raise ArtifactError(
            problem,
            place=str(file),
            remedy=_("tongwen run RECIPE --again writes it again"),
        )
    return report


def _rows(columns: Sequence[Mapping[str, Any]], *, only_differing: bool) -> list[tuple[str, ...]]:
    """Return rows of (name, value of each run)."""
    names = list(dict.fromkeys(name for column in columns for name in column))
    rows = [(name, [column.get(name) for column in columns]) for name in names]
    return [
        (name, *("–" if value in (None, "") else str(value) for value in values))
        for name, values in rows
        if not only_differing or any(value != values[0] for value in values)
    ]


def _curves(kind: str, runs: Sequence[TrainedRun]) -> list[tuple[str, Markup]]:
    """Return (heading, drawing) of each score, with the curves of all runs."""
    step, drawn = _("step"), []
    scores = (
        ("loss", _("loss"), _("nats per learned token")),
        ("bits_per_byte", _("held-out bits per byte"), "bits per byte"),
    )
    for key, title, label in scores:
        lines = {one.name: [(line["step"], line[key]) for line in one.metrics if key in line] for one in runs}
        if any(lines.values()):
            drawn.append((f"{kind} · {title}", curves(lines, step, label, smooth=key == "loss")))
    return drawn


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in settings.items():
        out |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return out
