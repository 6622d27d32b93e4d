"""The training report: data appear as plain text, never as markup; an image is written only if matplotlib is installed."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from tongwen.train.report import write_report

MARK = "<b>&\"'"
BOOKS = {
    "in": {"rows": 3, "bytes": 90},
    "lost": {"empty": {"rows": 1, "bytes": 0}},
    "kept": {"rows": 2, "bytes": 90},
    "files": {
        name: {"in": {"rows": 1}, "kept": {"rows": 1}, "lost": {f"why {MARK}": {"rows": 1}}}
        for name in (MARK, "b.jsonl")
    },
}
SCORES = {"before": 2.0, "after": 1.5}
REPORT: dict[str, Any] = {
    "summary": f"summary {MARK}",
    "held_out": {"bits_per_byte": SCORES, "groups": {f"zh {MARK}": {"bits_per_byte": SCORES}}},
    "trainable": {"share": 0.01, "parameters": 12_345},
    "mask": {
        "learned_share": 0.5,
        "stop_learned_share": 1.0,
        "roles": {"user": {"tokens": 10, "learned": 0}, "assistant": {"tokens": 10, "learned": 10}},
        "lengths": [(8, 1), (16, 2)],
    },
    "throughput": {"tokens_per_second": 1000.0, "seconds": 61.0},
    "peak_memory_bytes": 1 << 20,
    "notices": [f"notice {MARK}"],
    "ledger": {"prepare": BOOKS},
    "samples": [{"question": MARK, "before": MARK, "on_the_way": {5: MARK}, "after": MARK, "wanted": MARK}],
}
METRICS = [
    {"step": step, "loss": 3.0 / step, "bits_per_byte": 2.0, f"bits_per_byte_zh {MARK}": 1.75} for step in (1, 2)
]


def test_report_escapes_markup(tmp_path: Path) -> None:
    write_report(tmp_path, f"title {MARK}", REPORT, METRICS, f"recipe: {MARK}")
    page = (tmp_path / "report.html").read_text("utf-8")
    assert "<b>&" not in page.replace("<b>&lt;", "") and page.count("&lt;b&gt;&amp;") == 14
    for shown in ("2.000 → 1.500", "1.00%", "12.3 k", "61 s", "1.750 · 1.750", "1.500 (-25.0%)", "− empty", "≤ 16"):
        assert shown in page, shown
    assert page.count("<svg") == 2 and page.count("<table") == 5


def test_loss_curve_image_needs_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    write_report(tmp_path, "标题", REPORT, METRICS, "")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    bare = tmp_path / "bare"
    bare.mkdir()
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # as if it were not installed
    write_report(bare, "标题", REPORT, METRICS, "")
    assert [file.name for file in bare.iterdir()] == ["report.html"]
