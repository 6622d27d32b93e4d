"""bench/check.py knows every figure of the READMEs, and fails when one is off."""

from __future__ import annotations

import json
import re
import sys
from typing import Any

import pytest
from bench.check import FIGURES, ROOT, RUNS, SECTIONS, holds, measured_section, missing_words

from bench import check

# Numbers that say what was measured, not what was found.
CONDITIONS = ("SmolLM2", "1B", "8B", "2,000", "5 GB", "2B", "H100", "fp32", "bf16")


def arguments(*more: str) -> list[str]:
    return ["check.py", "--model", "m", "--text", "t", "--other", "o", *more]


@pytest.mark.parametrize("page", SECTIONS)
def test_every_number_of_the_readme_is_a_figure(page: str) -> None:
    text, place = measured_section(page), list(SECTIONS).index(page)
    for words in sorted([(figure.english, figure.chinese)[place] for figure in FIGURES], key=len, reverse=True):
        text = text.replace(words, "")
    for words in CONDITIONS:
        text = text.replace(words, "")
    assert re.findall(r"\d[\d.,]*", text) == []
    assert not missing_words()


@pytest.mark.parametrize("figure", [each for each in FIGURES if RUNS[each.run].result], ids=lambda each: each.english)
def test_figures_are_those_of_the_committed_results(figure: Any) -> None:
    found = json.loads((ROOT / "bench" / "results" / RUNS[figure.run].result).read_text(encoding="utf-8"))
    assert figure.key(found) == pytest.approx(figure.value, rel=0.08)  # the README rounds


def test_figure_off_by_more_than_a_quarter_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = {"2B": {"tongwen, 1": {"peak_mb": 80, "cpu_seconds": 4}, "peft, 1": {"peak_mb": 4600, "cpu_seconds": 8}}}
    monkeypatch.setattr(check, "measure", lambda *args: found)
    monkeypatch.setattr(sys, "argv", arguments("--only", "merge"))
    assert check.main() == 0
    out = capsys.readouterr().out
    assert out.count("ok  ") == 3 and "3 figures measured, 17 not checked, 0 off" in out
    found["2B"]["tongwen, 1"]["peak_mb"] = 84
    assert check.main() == 1
    assert "OFF          in 67 MB: 84" in capsys.readouterr().out
    assert not any(holds(figure, 1) for figure in FIGURES if figure.value == 0)


def test_what_the_machine_cannot_measure_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(check, "cpu_flags", lambda: ["avx2"])
    monkeypatch.setattr(check, "gpu", lambda: "")
    monkeypatch.setattr(check, "measure", lambda name, *rest: pytest.fail(name))
    monkeypatch.setattr(sys, "argv", arguments("--only", "sft", "cpt", "pipeline", "gpu"))
    assert check.main() == 0
    out = capsys.readouterr().out
    assert "0 figures measured, 20 not checked, 0 off" in out
    assert "0.36 of the CPU time: this processor has no amx_bf16; needs --peer and --data" in out
    assert "59,700 tokens a second: needs an H100" in out


def test_figure_that_left_the_readme_fails(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(check, "measured_section", lambda page: "")
    monkeypatch.setattr(check, "lacking", lambda run, args: "nothing is measured here")
    monkeypatch.setattr(sys, "argv", arguments())
    assert check.main() == 1
    assert "README_zh.md: 后者的 38 % is not there any more" in capsys.readouterr().out
