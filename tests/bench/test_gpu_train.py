"""bench/gpu_train.py on a CPU with toy shapes: it ends by itself with figures for all contestants, and counts as the formula does."""

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
import psutil
import pytest
import torch
from bench.gpu_train import Case, Race, flops_per_token, measure

from bench import gpu_train

ROOT = Path(__file__).parents[2]


@pytest.mark.sample()
def test_tiny_benchmark_reports_all_contestants(tmp_path: Path) -> None:
    out = tmp_path / "found.json"
    out.write_text('{"runs": [{"of": "another day"}]}')
    began = time.monotonic()
    done = subprocess.run(
        [
            sys.executable,
            "bench/gpu_train.py",
            "--tiny",
            "--out",
            str(out),
            "--only",
            " tongwen$| trainer, 8 x 8$|Unsloth, 16 x 4$",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    before, found = json.loads(out.read_text())["runs"]
    assert before == {"of": "another day"}, "runs that are there stay"
    rows = found["tasks"]["tiny lora"]
    assert "no python was named" in rows.pop("Unsloth, 16 x 4")["failed"]
    for name, row in rows.items():
        assert "failed" not in row, (name, row)
        assert row["versions"]["torch"] == torch.__version__
        assert row["tokens_per_second"] == pytest.approx(row["real_tokens"] / row["seconds"], rel=0.05)
        assert row["mfu"] is None, "nobody knows what this processor reaches"
        assert row["peak_memory_bytes"] > 1e8 and row["steps"] >= 1
    assert len(rows) == 2 and time.monotonic() - began < 300


@pytest.mark.parametrize("contestant", ["tongwen", "trainer, 4 x 16"])
def test_real_token_count_matches_the_trained_step(contestant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real tokens of the fourth step, in each contestant's own order."""
    samples = gpu_train.Samples("tiny")
    order = list(range(len(samples))) if contestant == "tongwen" else samples.grouped(4)
    found = measure(Case(contestant, "tiny", "full", 0.0))
    assert found["steps"] == 1 and found["real_tokens"] == samples.lengths[order[3 * 64 : 4 * 64]].sum()


@pytest.mark.parametrize("rows", [4, 8, 16])
def test_length_grouping_limits_padding_and_balances_steps(rows: int) -> None:
    samples = gpu_train.Samples("1B")
    order = samples.grouped(rows)
    assert sorted(order) == list(range(len(samples)))
    micro = samples.lengths[order].reshape(-1, rows)
    assert (micro.max(axis=1) * rows).sum() / micro.sum() < 1.12
    steps, whole = micro.reshape(-1, gpu_train.SAMPLES).sum(axis=1), samples.lengths.mean() * gpu_train.SAMPLES
    assert steps.std() < 0.4 * whole and abs(steps[3:13].mean() / whole - 1) < 0.1


def race(folder: Path, seconds: float = 60, **pythons: Any) -> Race:
    return Race(folder, time.monotonic() + seconds, 1.0, pythons)


@pytest.mark.sample()
def test_failure_is_reported_and_trainer_is_retried_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = Case("trainer, 1 x 1", "no-such", "lora", 0.0)
    reason = race(tmp_path).outcome(broken, race(tmp_path).start_case(broken))["failed"]
    assert "no-such" in reason and "exit status 1" in reason
    tried: list[bool] = []
    monkeypatch.setattr(Race, "start_case", lambda self, case: tried.append(case.recompute))
    monkeypatch.setattr(Race, "wait", lambda self, process: {"failed": "Triton Error [CUDA]: out of memory"})
    case = Case("trainer, 4 x 16", "8B", "lora", 1.0)
    assert race(tmp_path, 1000).outcome(case, None)["failed"].count("out of memory") == 2  # type: ignore[arg-type]
    assert tried == [True]
    late = Popen(["sleep", "60"], text=True, start_new_session=True)
    assert "no time" in race(tmp_path, 1).outcome(case, late)["failed"] and late.returncode != 0
    assert "no python" in race(tmp_path).skip_reason(Case("LLaMA-Factory, 16 x 4, Liger", "8B", "lora", 1.0))


def test_hanging_contestant_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may hang during imports or after writing its result; its children end with it."""
    monkeypatch.setattr(gpu_train, "IMPORT_SECONDS", 2)
    hangs = _python(tmp_path / "hangs", "exec sleep 60")
    lingers = _python(
        tmp_path / "lingers",
        'while [ "$1" != --out ]; do shift; done; touch "$(dirname "$2")/ready"; read go\n'
        'sleep 61 & echo $! > child; echo \'{"tokens_per_second": 1}\' > "$2"; wait',
    )
    folder = tmp_path / "race"
    (folder / "weights-tiny").mkdir(parents=True)
    (folder / "weights-tiny" / "tokenizer_config.json").touch()
    slow, done = (Case(f"{name}, 16 x 4", "tiny", "lora", 0.1) for name in gpu_train.PEERS)
    now = Race(folder, time.monotonic() + 60, -4.9, {"LLaMA-Factory": str(hangs), "Unsloth": str(lingers)})
    ready = now.start_all([slow, done])
    assert "not ready after 2 seconds" in now.outcome(slow, ready[slow])["failed"]
    assert now.outcome(done, ready[done]) == {"tokens_per_second": 1}
    child = int((gpu_train.result_file(ready[done]).parent / "child").read_text())
    until = time.monotonic() + 5  # a killed process is gone a moment later
    while runs(child) and time.monotonic() < until:
        time.sleep(0.05)
    assert not runs(child)


def runs(process: int) -> bool:
    try:
        return psutil.Process(process).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.mark.sample()
def test_peers_without_weights_are_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dead = _python(tmp_path / "dead", "kill -9 $$")
    monkeypatch.setattr(gpu_train.sys, "executable", str(dead))
    now = race(tmp_path, Unsloth=str(dead))
    case = Case("Unsloth, 16 x 4", "tiny", "lora", 0.1)
    assert now.outcome(case, now.start_all([case])[case])["failed"] == "no output (exit status -9)"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--only", "nobody"), "nobody is called"),
        (("--only", "("), "--only"),
        (("--unsloth", "no/python"), "no program"),
    ],
)
def test_invalid_arguments_are_refused(arguments: tuple[str, ...], message: str, tmp_path: Path, capsys: Any) -> None:
    with pytest.raises(SystemExit) as left, pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu_train.sys, "argv", ["gpu_train.py", "--tiny", "--out", str(tmp_path / "out"), *arguments])
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        gpu_train.main()
    assert left.value.code == 2 and message in capsys.readouterr().err


def test_long_out_of_memory_message_is_recognised(tmp_path: Path) -> None:
    output = "x\ntorch.OutOfMemoryError: " + "CUDA out of memory. " * 99 + "\nlast"
    now = race(tmp_path)
    found = now.wait(
        now.start(["-c", f"print({output!r})"], str(_python(tmp_path / "it", f'shift; exec {sys.executable} "$@"')))
    )
    assert found["failed"].startswith("torch.OutOfMemoryError")


def test_flops_per_token_match_the_formula(monkeypatch: pytest.MonkeyPatch) -> None:
    """Llama-3.1-8B under an adapter, documents of 500 tokens, all learned: 4 x (6.98e9 + 0.525e9) + 0.39e9 and the adapter."""
    from peft import LoraConfig, get_peft_model

    monkeypatch.setattr(gpu_train, "device", lambda: "meta")
    with torch.device("meta"):
        model = gpu_train.make_model(SimpleNamespace(tiny=False, shape="8B", method="lora"))  # type: ignore[arg-type]
        full = flops_per_token(model, _samples(500), "full")
        model = get_peft_model(model, LoraConfig(r=16, target_modules="all-linear"))
    assert flops_per_token(model, _samples(500), "lora") == pytest.approx(30.4e9 + 6 * 41.9e6, rel=1e-3)
    assert full == pytest.approx(45.4e9, rel=2e-3)


def _python(program: Path, does: str) -> Path:
    """Write a shell script to start in place of a python."""
    program.write_text(f"#!/bin/sh\n{does}\n")
    program.chmod(0o755)
    return program


def _samples(length: int) -> Any:
    return SimpleNamespace(lengths=np.full(8, length), prompts=np.zeros(8, int))
