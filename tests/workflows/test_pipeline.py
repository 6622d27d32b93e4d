"""How many processes a recipe runs in: as the recipe, the launcher and the machine agree, or refused before anything runs."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.launching import run_ranks
from tests.recipe.engine_files import recipe
from tongwen.cli import main
from tongwen.core import distributed
from tongwen.core.errors import TongwenError
from tongwen.model.loading import devices
from tongwen.recipe.load import load_recipe
from tongwen.workflows import pipeline


@pytest.fixture()
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """No launcher; what a command takes from the environment comes back."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", distributed.EXIT_FILE, distributed.START_TIME):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setattr(distributed, "torchrun", lambda *arguments: pytest.fail("no process may start"))


@pytest.mark.parametrize(
    ("world", "overrides", "code", "message"),
    [
        (None, (), 2, "sft.engine: ddp: this engine needs several processes\n  → tongwen run RECIPE --devices 2"),
        (1, (), 2, "several processes"),
        (
            4,
            ("--devices", "2"),
            2,
            "devices: 2: the launcher started 4 processes\n  → tongwen run RECIPE devices=4",
        ),
        (None, ("--devices", "0"), 2, "devices: 0 must be greater than or equal to 1"),
        (
            None,
            ("--devices", "3"),
            5,
            "devices: 3: this machine has 2 visible GPUs; each process needs one\n  → --devices 2",
        ),
    ],
)
@pytest.mark.usefixtures("alone")
def test_wrong_process_count_is_refused_before_running(
    world: int | None,
    overrides: tuple[str, ...],
    code: int,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    tongwen: Any,
) -> None:
    if world:
        monkeypatch.setenv("RANK", "0")
        monkeypatch.setenv("LOCAL_RANK", "0")
        monkeypatch.setenv("WORLD_SIZE", str(world))
    monkeypatch.setattr(devices, "count_devices", lambda: 2)
    out = tmp_path / "out"
    found, _, err = tongwen("run", recipe(tmp_path, "ddp"), f"out={out}", *overrides)
    assert found == code and message in err and not (out / "prepare").exists()


@pytest.mark.usefixtures("alone")
def test_check_reports_an_engine_with_one_process(tmp_path: Path, tongwen: Any) -> None:
    file = recipe(tmp_path, "ddp")
    assert "this engine needs several processes" in "".join(tongwen("check", file)[1:])
    assert "several processes" not in "".join(tongwen("check", file, "devices=2")[1:])


@pytest.mark.usefixtures("alone")
def test_finished_training_needs_no_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "count_devices", lambda: 1)
    made = load_recipe(recipe(tmp_path, "auto"), ["devices=2"])[0]
    with pytest.raises(TongwenError, match="this machine has 1 visible GPU;"):
        pipeline._check_devices(made, ["prepare", "sft"])
    pipeline._check_devices(made, ["prepare", "export"])


@pytest.mark.usefixtures("alone")
def test_accelerate_cpu_single_process_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tongwen: Any
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
    out = tongwen("run", recipe(tmp_path, "auto"), f"out={tmp_path / 'out'}", "--only", "prepare")
    assert "starts only one process and ignores --num_processes" in "".join(out[1:])


@pytest.mark.usefixtures("alone")
def test_own_single_process_counts_as_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    """`engine: fsdp2` on one GPU: torchrun has started it."""
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "1"), (distributed.EXIT_FILE, "somewhere")):
        monkeypatch.setenv(name, value)
    distributed.read_launcher_environment()
    assert distributed.is_launched()
    monkeypatch.delenv(distributed.EXIT_FILE)
    for size in ("1", ""):
        monkeypatch.setenv("RANK", "0")
        monkeypatch.setenv("WORLD_SIZE", size)
        distributed.read_launcher_environment()
        assert not distributed.is_launched() and distributed.world_size() == 1


@pytest.mark.parametrize(("rank", "visible", "taken"), [(3, 8, 3), (3, 1, 0), (3, 2, 1), (3, 0, None)])
@pytest.mark.usefixtures("alone")
def test_process_uses_its_own_visible_gpu(
    rank: int, visible: int, taken: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = list[int]()
    monkeypatch.setenv("LOCAL_RANK", str(rank))
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: visible > 0)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: visible)
    monkeypatch.setattr(torch.accelerator, "set_device_index", chosen.append)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **options: torch.device("cuda"))
    assert devices.compute_device() == ("cuda" if visible else "cpu")
    assert chosen == ([taken] if visible else [])
    assert os.environ["LOCAL_RANK"] == str(rank if taken is None else taken)


def test_two_processes_on_one_gpu_raise_an_error() -> None:
    cause = main._machine_cause(
        RuntimeError("NCCL error: Duplicate GPU detected : rank 1 and rank 0 both on device 1b000")
    )
    assert cause and "two processes of this run use the same GPU" in cause


def test_waiting_processes_end_when_rank_0_fails(tmp_path: Path, capfd: Any) -> None:
    """As under `srun` without -K."""

    def shorten_timeout(rank: int) -> None:
        pipeline.PATIENCE_SECONDS = 1  # type: ignore[assignment]

    file = recipe(tmp_path, "auto")
    (tmp_path / "data.jsonl").write_text("nonsense\n")
    assert run_ranks(2, "run", file, f"out={tmp_path / 'out'}", before=shorten_timeout, seconds=30) == [3, 5]
    assert "prepare: the first process ended without finishing it" in capfd.readouterr().err
