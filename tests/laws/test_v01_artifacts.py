"""Files of version 0.1 can be opened and continued: no renaming or moving in the code may cost a user a run.

make.py in tests/data/v0.1 made that folder once; it is never regenerated. The tests use the command line, with relative paths,
in a copy of the folder.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import tongwen as package
from tests.conftest import tensors, type_lines
from tongwen.train.packing import BatchPlan, make_plan
from tongwen.workflows.training import phases

DATA = Path(__file__).parents[1] / "data" / "v0.1"
ATOL = (
    1e-6  # what another processor may move a weight by: with other kernels it was 1.2e-7, with those that made them 0
)
TIMES = {"seconds", "cpu_seconds", "tokens_per_second"}
RUNS = {"sft": ("sft", 10), "pretrain": ("pretrain", 12), "phases": ("pretrain", 12)}  # recipe: stage, steps


def load_make() -> Any:
    """Load the script, for its servers."""
    spec = importlib.util.spec_from_file_location("v01_make", DATA / "make.py")
    assert spec and spec.loader
    module = sys.modules["v01_make"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


make = load_make()


@pytest.fixture()
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder: a copy of all files of version 0.1 with their times."""
    folder = tmp_path / "elsewhere"
    shutil.copytree(DATA, folder, ignore=shutil.ignore_patterns("make.py", "__pycache__"))
    for file in folder.rglob("*"):
        os.utime(file, (make.MTIME, make.MTIME))
    monkeypatch.chdir(folder)
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    return folder


def read(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8"))


def rows(file: Path) -> list[Any]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def hashes(folder: Path) -> dict[str, str]:
    files = (file for file in folder.rglob("*") if file.is_file() and file.name != ".lock")
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def is_of_this_version(folder: Path) -> bool:
    """Return whether caches that record a version are still valid."""
    return read(next(folder.glob("*/manifest.json")))["tongwen"] == package.__version__


# -- training ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RUNS)
def test_stopped_run_resumes_to_the_same_result(
    name: str, place: Path, tongwen: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`phases` was stopped in its second phase, and its base is a vocabulary stage. The sums of version 0.1 stay: all
    its steps have the same number of micro-batches."""
    uniform = list[bool]()

    def plan(*args: Any, **kwargs: Any) -> BatchPlan:
        uniform.append(kwargs["uniform"])
        return make_plan(*args, **kwargs)

    monkeypatch.setattr(phases, "make_plan", plan)
    stage, steps = RUNS[name]
    expected = place / ("finished/sft" if name == "sft" else f"expected/{name}")
    left = place / name / f"{stage}.partial"
    run, before, stopped = read(left / "run.json"), read(left / "before.json"), rows(left / "metrics.jsonl")
    phase, taken = ("phase-2/", 4) if name == "phases" else ("", 0)
    done = taken + max(int(file.name[11:]) for file in left.glob(f"checkpoints/{phase}checkpoint-*"))
    assert 0 < done <= len(stopped) < steps, "it was stopped in the middle"

    code, out, err = tongwen("run", f"{name}.yaml", f"--until={stage}")
    assert code == 0, err
    assert uniform and all(uniform)
    assert f"continuing after step {done} of {steps}" in out
    assert "prepare: already done" in out
    if stage != "sft":  # the text of its template has changed since: its tokens are encoded again
        assert ("tokens: already encoded" in out) == is_of_this_version(place / name)
    made, manifest = place / name / stage, read(place / name / stage / "manifest.json")
    assert (manifest["run"], manifest["forks"], manifest["steps"]) == (run["run"], [], steps)
    assert read(made / "before.json") == before
    assert not left.exists()

    wanted, found = rows(expected / "metrics.jsonl"), rows(made / "metrics.jsonl")
    assert found[:done] == stopped[:done], "what was done is not done again"
    assert len(found) == len(wanted) == steps
    for one, other in zip(found, wanted, strict=True):
        assert one.keys() == other.keys()
        for key in one.keys() - TIMES:
            exact = isinstance(other[key], int) or key in ("epoch", "learning_rate")
            assert one[key] == (other[key] if exact else pytest.approx(other[key], rel=1e-5)), (one["step"], key)
    wanted, found = tensors(expected), tensors(made)
    assert found.keys() == wanted.keys()
    for key in wanted:
        assert torch.allclose(found[key], wanted[key], rtol=0, atol=ATOL), key


@pytest.mark.parametrize(
    ("change", "stage"),
    [("sft.learning_rate=2e-3", "sft.partial"), ("sft.adapter.rank=4", "sft.partial"), ("seed=7", "prepare")],
)
def test_other_settings_are_refused(change: str, stage: str, place: Path, tongwen: Any) -> None:
    before = hashes(place / "sft" / "sft.partial")
    code, _, err = tongwen("run", "sft.yaml", change)
    assert (
        code == 2
        and f"sft/{stage}: the existing result was made from different settings" in err
        and change.split("=")[0] in err
    )
    assert hashes(place / "sft" / "sft.partial") == before


def test_fork_records_its_origin(place: Path, tongwen: Any) -> None:
    run = read(place / "sft" / "sft.partial" / "run.json")["run"]
    code, _, err = tongwen("run", "sft.yaml", "sft.learning_rate=2e-3", "sft.evaluate_every=9", "--fork", "--until=sft")
    assert code == 0, err
    (fork,) = read(place / "sft" / "sft" / "manifest.json")["forks"]
    assert fork["from"] == run and fork["changed"] == [["sft.learning_rate", 0.001, 0.002]]


# -- what is finished ----------------------------------------------------------------------------------------------


def test_finished_run_is_not_repeated(place: Path, tongwen: Any) -> None:
    before = hashes(place / "finished")
    code, out, err = tongwen("run", "sft.yaml", "out=finished")
    assert code == 0, err
    assert [stage for stage in ("prepare", "sft", "merge") if f"{stage}: already done" in out] == [
        "prepare",
        "sft",
        "merge",
    ]
    assert hashes(place / "finished") == before
    code, _, err = tongwen("run", "sft.yaml", "out=finished", "sft.learning_rate=2e-3")
    assert code == 2 and "0.001 → 0.002" in err


def test_repeated_merge_is_byte_identical(place: Path, tongwen: Any) -> None:
    code, _, err = tongwen("merge", "--base", "base", "--adapter", "finished/sft", "--out", "merged")
    assert code == 0, err
    new, old = place / "merged", place / "finished" / "merge"
    assert hashes(new).keys() == hashes(old).keys()
    assert (new / "model.safetensors").read_bytes() == (old / "model.safetensors").read_bytes()
    assert read(new / "manifest.json")["fingerprint"] == read(old / "manifest.json")["fingerprint"]


@pytest.mark.parametrize("stage", ["sft", "merge"])
def test_artifacts_are_shown_and_verified(stage: str, place: Path, tongwen: Any) -> None:
    path = f"finished/{stage}"
    code, out, err = tongwen("show", path, "--json")
    assert code == 0, err
    assert json.loads(out)["artifacts"] == {path: read(place / path / "manifest.json")}
    code, out, err = tongwen("verify", path)
    assert code == 0 and "agree" in out, err
    file = next(file for file in (place / path).iterdir() if file.suffix == ".safetensors")
    file.write_bytes(file.read_bytes()[:-2] + b"5\n")
    code, _, err = tongwen("verify", path)
    assert code == 4 and "manifest.json says" in err


def test_lineage_is_complete(place: Path, tongwen: Any) -> None:
    code, out, err = tongwen("show", "finished/merge")
    assert code == 0, err
    for stage in ("merge", "sft", "prepare"):
        assert read(place / "finished" / stage / "manifest.json")["fingerprint"][:12] in out
    assert "has changed since" not in out


def test_show_html_reports_the_scores(place: Path, tongwen: Any) -> None:
    code, out, err = tongwen("show", "finished", "--html", "page.html")
    assert code == 0, err
    report, manifest = (read(place / "finished" / "sft" / f"{name}.json") for name in ("report", "manifest"))
    for number in (f"{report['held_out']['bits_per_byte']['after']:.4f}", f"{manifest['tokens']:,}"):
        assert number in out and number in (place / "page.html").read_text(encoding="utf-8")


# -- conversations -------------------------------------------------------------------------------------------------


def test_saved_conversation_is_byte_identical(place: Path, tongwen: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = read(place / "chat.json")["messages"]
    assert [turn["role"] for turn in kept] == ["user", "assistant"] * 2
    type_lines([*(turn["content"] for turn in kept[::2]), "/save again.json"], monkeypatch)
    code, _, err = tongwen("chat", "finished/merge", "--max-new-tokens", 8)
    assert code == 0, err
    assert (place / "again.json").read_bytes() == (place / "chat.json").read_bytes()
