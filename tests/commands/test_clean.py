"""clean: lists and deletes what finished runs no longer need, and nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import write_recipe
from tongwen.core import artifact
from tongwen.workflows.run_lock import lock_folder


@pytest.fixture(scope="module")
def made(chat_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run whose stages were redone once."""
    from tongwen.cli.main import main

    folder = tmp_path_factory.mktemp("made")
    recipe = write_recipe(folder, chat_model, sft=", stop_after: 2 steps, save_every: 1")
    assert main(["run", str(recipe)]) == 0
    assert main(["run", str(recipe), "seed=7", "--again"]) == 0
    return folder


@pytest.fixture()
def run_folder(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    import shutil

    shutil.copytree(made, tmp_path / "runs")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "runs"


def listing(tongwen: Any, *words: str) -> dict[str, Any]:
    code, out, err = tongwen("clean", "--json", *words)
    assert code == 0, err
    return dict(json.loads(out))


def everything(folder: Path) -> set[Path]:
    return {*folder.rglob("*")}


def test_nothing_is_deleted_unless_confirmed(run_folder: Path, tongwen: Any) -> None:
    before = everything(run_folder)
    found = listing(tongwen)
    assert not found["deleted"] and everything(run_folder) == before
    kinds = {one["what"] for one in found["found"]}
    assert len(kinds) == 2 and found["bytes"] == sum(one["bytes"] for one in found["found"]) > 0


def test_only_leftovers_are_deleted(run_folder: Path, tongwen: Any) -> None:
    out = run_folder / "out"
    kept = [out / "sft" / "adapter_model.safetensors", out / "merge" / "model.safetensors", run_folder / "recipe.yaml"]
    contents = [file.read_bytes() for file in kept]
    (run_folder / "mine.old-1").mkdir()  # of the user: nothing in it says that tongwen made it
    (run_folder / "checkpoints").mkdir()
    (run_folder / "linked").symlink_to(out / "sft.old-1")
    half = out / "pretrain.partial" / "checkpoints" / "checkpoint-1"
    half.mkdir(parents=True)
    assert listing(tongwen, "--yes")["deleted"]
    assert not list(out.glob("*.old-*")) and not (out / "sft" / "checkpoints").exists()
    assert [file.read_bytes() for file in kept] == contents
    assert half.is_dir() and (run_folder / "mine.old-1").is_dir() and (run_folder / "checkpoints").is_dir()
    assert listing(tongwen)["found"] == []
    assert tongwen("run", run_folder / "recipe.yaml", "seed=7", f"out={out}")[0] == 0, "the run is still whole"
    assert artifact.find(out / "sft") is not None


def test_run_at_work_is_left_alone(run_folder: Path, tongwen: Any) -> None:
    before = everything(run_folder)
    with lock_folder(run_folder / "out"):
        assert listing(tongwen, "--yes")["found"] == []
        assert everything(run_folder) <= before | {run_folder / "out" / ".lock"}


def test_cache_is_listed_on_request(
    run_folder: Path, tmp_path: Path, tongwen: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "cache" / "tongwen" / "data").mkdir(parents=True)
    (tmp_path / "cache" / "other").mkdir()
    listed = {one["path"] for one in listing(tongwen, "--cache")["found"]}
    assert str(tmp_path / "cache" / "tongwen" / "data") in listed and str(tmp_path / "cache" / "other") not in listed


def test_missing_folder_is_refused(tmp_path: Path, tongwen: Any) -> None:
    code, _, err = tongwen("clean", tmp_path / "no")
    assert code == 2 and "no" in err
