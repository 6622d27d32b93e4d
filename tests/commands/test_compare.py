"""`tongwen show RUN RUN`: differing settings, results and curves."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import write_recipe
from tests.launching import run_forked
from tongwen.core.html import curve, curves


@pytest.fixture(scope="module")
def runs(chat_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    for name, rank in (("wide", 8), ("<narrow>", 2)):
        recipe = write_recipe(folder / name, chat_model, sft=", stop_after: 3 steps, evaluate_every: 1", merge=False)
        overrides = [f"sft.adapter.rank={rank}", *(["sft.micro_batch_tokens=999"] if rank == 2 else [])]
        assert run_forked("run", recipe, *overrides) == 0
    return folder


def test_differing_settings_and_curves_are_shown(runs: Path, tongwen: Any, tmp_path: Path) -> None:
    html = tmp_path / "compare.html"
    folders = [runs / name / "out" for name in ("wide", "<narrow>")]
    code, out, err = tongwen("show", *folders, "--html", html, "--json")
    found = json.loads(out)["sft"]
    assert code == 0 and [one["settings"]["sft.adapter.rank"] for one in found.values()] == [8, 2]
    assert "sft.adapter.rank" in err and "sft.max_length" not in err, "only what differs"
    assert "sft.micro_batch_tokens" in err and "sft.save_every" not in err, "words that decide nothing, too"
    text = html.read_text(encoding="utf-8")
    for drawing in re.findall(r"<svg.*?</svg>", text):
        assert drawing.count("<polyline") == 4  # each run's line and its mean
    assert text.count("<svg") == 2 and "http" not in text
    assert "&lt;narrow&gt;" in text and "<narrow>" not in text
    for one, (before, after) in zip(found.values(), held_out(folders), strict=True):
        assert one["report"]["held_out"]["bits_per_byte"] == {"before": before, "after": after}
        assert f"{before:.4f}" in err and f"{after:.4f}" in err and f"{after:.4f}" in text


def held_out(folders: list[Path]) -> list[tuple[float, float]]:
    reports = [json.loads((folder / "sft" / "report.json").read_text())["held_out"] for folder in folders]
    return [(one["bits_per_byte"]["before"], one["bits_per_byte"]["after"]) for one in reports]


def test_folder_without_training_is_refused(runs: Path, tongwen: Any) -> None:
    code, _, err = tongwen("show", runs / "wide" / "out", runs / "wide" / "out" / "prepare")
    assert code == 4 and "no training has finished here" in err and str(runs / "wide" / "out" / "prepare") in err


def test_run_named_twice_is_refused(runs: Path, tongwen: Any, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(runs / "wide" / "out")
    for again in (runs / "wide" / "out", runs / "wide" / "out" / "sft", tmp_path / "link"):
        code, _, err = tongwen("show", runs / "wide" / "out", again)
        assert code == 2 and f"{again}: this run is named twice" in err


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "cannot be read"), ("[]", "lacks held_out, peak"), ("3", "cannot be read"), (None, "cannot be read")],
)
def test_damaged_report_is_reported(text: str | None, message: str, runs: Path, tongwen: Any, tmp_path: Path) -> None:
    file = shutil.copytree(runs / "wide" / "out", tmp_path / "spoilt") / "sft" / "report.json"
    file.unlink()
    if text:
        file.write_text(text)
    code, _, err = tongwen("show", runs / "wide" / "out", tmp_path / "spoilt")
    assert code == 4 and f"{file}: it {message}" in err and "--again" in err


def test_single_curve_keeps_its_rendering() -> None:
    points = [(1.0, 2.0), (2.0, 1.0), (4.0, 1.5)]
    alone = curve(points, "step", "loss")
    assert alone == curves({"": points}, "step", "loss") and "names" not in alone
    assert curve([], "step", "loss") == ""
    assert ">-" not in curve([(1, 0.0), (2, 1e-3)], "step", "lr"), "what is never negative has no axis below zero"
    both = curves({"a": points, "empty": [], "b": [(0.0, 9.0), (8.0, 0.0)]}, "step", "loss")
    assert "empty" not in both and both.count("<i ") == 2
