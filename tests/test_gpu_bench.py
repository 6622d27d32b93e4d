"""bench/gpu_train.py on a CPU with toy shapes: it ends by itself with figures for everybody, and counts as the formula does."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from subprocess import Popen
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from bench import gpu_train
from bench.gpu_train import Case, Race, flops_per_token, measure

ROOT = Path(__file__).parent.parent


def test_the_whole_benchmark_in_small(tmp_path: Path) -> None:
    out = tmp_path / "found.json"
    began = time.monotonic()
    done = subprocess.run(
        [
            sys.executable,
            "bench/gpu_train.py",
            "--tiny",
            "--out",
            str(out),
            "--only",
            " tongwen$| trainer.*sorted$|Unsloth, 16 x 4, sorted$",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    rows = found["tasks"]["tiny lora"]
    assert "no python was named" in rows.pop("Unsloth, 16 x 4, sorted")["failed"]
    for name, row in rows.items():
        assert "failed" not in row, (name, row)
        assert row["versions"]["torch"] == torch.__version__
        assert row["tokens_per_second"] == pytest.approx(row["real_tokens"] / row["seconds"], rel=0.05)
        assert row["mfu"] == pytest.approx(row["tokens_per_second"] * row["flops_per_token"] / 989e12, rel=1e-3)
        assert row["peak_memory_bytes"] > 1e8 and row["steps"] >= 1
    assert len(rows) == 2 and time.monotonic() - began < 300


@pytest.mark.parametrize("contestant", ["tongwen", "trainer, 4 x 16"])
def test_in_full_everybody_trains_the_same_tokens(contestant: str) -> None:
    found = measure(Case(contestant, "tiny", "full", 0.0))
    lengths = gpu_train.Samples("tiny").lengths
    assert found["steps"] == 1 and found["real_tokens"] == lengths[3 * 64 : 4 * 64].sum()


def test_what_fails_is_told_and_the_trainer_is_tried_once_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def race(seconds: float) -> Race:
        return Race(tmp_path, time.monotonic() + seconds, 1.0, {})

    broken = Case("trainer, 1 x 1", "no-such", "lora", 0.0)
    assert "no-such" in race(60).outcome(broken, race(60).start_case(broken))["failed"]
    tried: list[bool] = []
    monkeypatch.setattr(Race, "start_case", lambda self, case: tried.append(case.recompute))
    monkeypatch.setattr(Race, "wait", lambda self, process: {"failed": "torch.OutOfMemoryError: CUDA out of memory."})
    case = Case("trainer, 4 x 16", "8B", "lora", 1.0)
    assert "OutOfMemory" in race(1000).outcome(case, None)["failed"]  # type: ignore[arg-type]
    assert tried == [True]
    late = Popen(["sleep", "60"], text=True)
    assert "no time" in race(1).outcome(case, late)["failed"] and late.wait() != 0
    assert "no python" in race(60).why_not("LLaMA-Factory, 16 x 4, Liger")


def test_a_long_message_of_full_memory_is_known(tmp_path: Path) -> None:
    said = "x\ntorch.OutOfMemoryError: " + "CUDA out of memory. " * 99 + "\nlast"
    race = Race(tmp_path, time.monotonic() + 60, 1.0, {})
    found = race.wait(race.start(["-c", f"print({said!r})"], str(_echo(tmp_path))))
    assert found["failed"].startswith("torch.OutOfMemoryError")


def test_operations_are_counted_by_the_formula(monkeypatch: pytest.MonkeyPatch) -> None:
    """Llama-3.1-8B under an adapter, documents of 500 tokens, all learned: 4 x (6.98e9 + 0.525e9) + 0.39e9 and the adapter."""
    from peft import LoraConfig, get_peft_model

    monkeypatch.setattr(gpu_train, "device", lambda: "meta")
    with torch.device("meta"):
        model = gpu_train.make_model(SimpleNamespace(tiny=False, shape="8B", method="lora"))  # type: ignore[arg-type]
        full = flops_per_token(model, _samples(500), "full")
        model = get_peft_model(model, LoraConfig(r=16, target_modules="all-linear"))
    assert flops_per_token(model, _samples(500), "lora") == pytest.approx(30.4e9 + 6 * 41.9e6, rel=1e-3)
    assert full == pytest.approx(45.4e9, rel=2e-3)


def _echo(folder: Path) -> Path:
    """A python that runs the words after the script's name."""
    program = folder / "python"
    program.write_text(f'#!/bin/sh\nshift; exec {sys.executable} "$@"\n')
    program.chmod(0o755)
    return program


def _samples(length: int) -> Any:
    return SimpleNamespace(lengths=np.full(8, length), prompts=np.zeros(8, int))
