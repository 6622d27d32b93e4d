"""bench/gpu_train.py on a CPU with toy shapes: it ends by itself with figures for everybody, and counts as the formula does."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from bench import gpu_train
from bench.gpu_train import Case, flops_per_token, in_its_own_process, measure

ROOT = Path(__file__).parent.parent


def test_the_whole_benchmark_in_small(tmp_path: Path) -> None:
    out = tmp_path / "found.json"
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "bench/gpu_train.py", "--tiny", "--out", str(out)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    assert found["versions"]["torch"] == torch.__version__
    for name, row in found["tasks"]["tiny lora"].items():
        assert "failed" not in row, (name, row)
        assert row["tokens_per_second"] == pytest.approx(row["real_tokens"] / row["seconds"], rel=0.05)
        assert row["mfu"] == pytest.approx(row["tokens_per_second"] * row["flops_per_token"] / 989e12, rel=1e-3)
        assert row["peak_memory_bytes"] > 1e8 and row["steps"] >= 1
    assert len(found["tasks"]["tiny lora"]) == 2 and time.monotonic() - began < 300


@pytest.mark.parametrize("contestant", ["tongwen", "trainer, 4 x 16"])
def test_in_full_everybody_trains_the_same_tokens(contestant: str) -> None:
    found = measure(Case(contestant, "tiny", "full", 0.0))
    lengths = gpu_train.Samples("tiny").lengths
    assert found["steps"] == 1 and found["real_tokens"] == lengths[3 * 64 : 4 * 64].sum()


def test_what_fails_is_told_and_the_trainer_is_tried_once_more(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "no-such" in in_its_own_process(Case("trainer, 1 x 1", "no-such", "lora", 0.0), 60)["failed"]
    tried: list[bool] = []

    def no_room(case: Case, limit: float) -> dict[str, Any]:
        tried.append(case.recompute)
        return {"failed": "torch.OutOfMemoryError: CUDA out of memory."}

    monkeypatch.setattr(gpu_train, "in_its_own_process", no_room)
    end = time.monotonic() + 1000
    assert "OutOfMemory" in gpu_train.run_case(Case("trainer, 4 x 16", "8B", "lora", 1.0), end)["failed"]
    assert tried == [False, True]
    assert "no time" in gpu_train.run_case(Case("tongwen", "8B", "lora", 1.0), time.monotonic() + 5)["failed"]


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


def _samples(length: int) -> Any:
    return SimpleNamespace(lengths=np.full(8, length), prompts=np.zeros(8, int))
