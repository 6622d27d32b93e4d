"""launch: each job is one that its scheduler accepts, and starts the recipe where the scheduler starts it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.conftest import write_recipe

STUBS = {"scontrol": "echo localhost\n", "srun": 'shift; exec "$@"\n'}  # one machine; srun's own word, then its command


def make(tongwen: Any, recipe: Path, scheduler: str, *words: str) -> tuple[Path, str]:
    out = recipe.parent / f"job-{scheduler}"
    code, text, err = tongwen("launch", recipe.name, "--to", scheduler, "--out", out.name, *words)
    assert code == 0, err
    return out, text + err


@pytest.fixture()
def recipe(chat_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return write_recipe(tmp_path, chat_model, sft=", stop_after: 2 steps")


@pytest.mark.sample()
@pytest.mark.parametrize("scheduler", ["slurm", "skypilot", "kubeflow"])
def test_job_runs_the_recipe_in_two_processes(scheduler: str, recipe: Path, tmp_path: Path, tongwen: Any) -> None:
    out, _ = make(tongwen, recipe, scheduler, "--devices", "2", "--image", "x", "--volume", "x")
    stubs = tmp_path / "stubs"
    stubs.mkdir()
    for name, text in STUBS.items():
        (stubs / name).write_text(f"#!/bin/bash\n{text}")
        (stubs / name).chmod(0o755)
    environment = {**os.environ, "PATH": f"{stubs}:{Path(sys.executable).parent}:{os.environ['PATH']}"}
    if scheduler == "slurm":
        script = out.read_text()
        environment |= {"SLURM_JOB_NODELIST": "localhost", "SLURM_JOB_ID": "7"}
    elif scheduler == "skypilot":
        script = yaml.safe_load(out.read_text())["run"]
        environment |= {"SKYPILOT_NODE_IPS": "127.0.0.1\n", "SKYPILOT_NUM_NODES": "1"}
    else:
        trainer = yaml.safe_load(out.read_text())["spec"]["trainer"]
        script = trainer["command"][-1].replace("/workspace", str(tmp_path))
        environment |= {"PET_NNODES": "1", "PET_NPROC_PER_NODE": str(trainer["numProcPerNode"])}
    script = script.replace(":29500", ":0")  # any free port
    done = subprocess.run(
        ["bash", "-c", script], env=environment, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "out" / "sft" / "manifest.json").read_text())["micro_batches"]["world"] == 2
    assert (tmp_path / "out" / "merge" / "config.json").is_file()


def test_schedulers_accept_the_job(recipe: Path, tongwen: Any) -> None:
    out, err = make(tongwen, recipe, "slurm", "--devices", "8", "--nodes", "2", "seed=7")
    assert subprocess.run(["bash", "-n", str(out)], check=False).returncode == 0
    lines = [line for line in out.read_text().splitlines() if line.startswith("#SBATCH ")]
    assert "#SBATCH --nodes=2" in lines and "#SBATCH --gpus-per-node=8" in lines and f"sbatch {out.name}" in err
    assert "--nnodes=2 --nproc-per-node=8" in out.read_text() and "run recipe.yaml seed=7" in out.read_text()
    out, _ = make(tongwen, recipe, "skypilot", "--devices", "4", "--gpu", "40GB")
    task = yaml.safe_load(out.read_text())
    assert task["resources"]["accelerators"] == "40GB+:4" and task["workdir"] == str(recipe.parent)
    out, err = make(tongwen, recipe, "kubeflow", "--nodes", "3")
    assert "--volume" in err
    models = pytest.importorskip("kubeflow_trainer_api.models")
    for words in ((), ("--image", "registry/tongwen:1", "--volume", "claim")):
        out.unlink()
        make(tongwen, recipe, "kubeflow", "--nodes", "3", *words)
        data = yaml.safe_load(out.read_text())
        job = models.TrainerV1alpha1TrainJob.from_dict(data)
        assert job.spec.trainer.num_nodes == 3 and job.to_dict() == data, "no word that the schema does not know"


def test_skypilot_accepts_the_task(recipe: Path, tongwen: Any) -> None:
    schemas = pytest.importorskip("sky.utils.schemas")
    import jsonschema

    task = yaml.safe_load(make(tongwen, recipe, "skypilot", "--devices", "4")[0].read_text())
    jsonschema.validate(task, schemas.get_task_schema())
    jsonschema.validate(task["resources"], schemas.get_resources_schema())


@pytest.mark.parametrize(
    ("words", "place", "remedy"),
    [
        (("devices=3", "--nodes", "2"), "devices: 3", "--devices N"),
        (("devices=4", "--devices", "4", "--nodes", "2"), "devices: 4", "devices=8"),
    ],
)
def test_impossible_jobs_are_refused(
    words: tuple[str, ...], place: str, remedy: str, recipe: Path, tongwen: Any
) -> None:
    code, _, err = tongwen("launch", recipe.name, "--to", "slurm", "--out", "job.sh", *words)
    assert code == 2 and place in err and remedy in err and not Path("job.sh").exists()


def test_recipe_and_files_outside_of_the_sent_folder(
    recipe: Path, tongwen: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, err = make(tongwen, recipe, "skypilot")
    assert f"{recipe.parent / 'data.jsonl'}: the machines need" in err.replace("\n", "")
    elsewhere = recipe.parent / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    code, _, err = tongwen("launch", recipe, "--to", "kubeflow", "--out", "job.yaml")
    assert code == 2 and f"cd {recipe.parent}" in err
    assert tongwen("launch", recipe, "--to", "slurm", "--out", "job.sh")[0] == 0
    assert tongwen("launch", recipe, "--to", "slurm", "--out", recipe)[0] == 2, "an input is no output"
