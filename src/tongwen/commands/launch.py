"""launch: write the job that runs a recipe under Slurm, SkyPilot or Kubeflow Trainer.

Each job starts torchrun on every machine, and torchrun starts `tongwen run`. A process that ends is started again, and a job
that is run again continues: both are the same command, which continues from its last checkpoint.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tongwen.core import console, originals
from tongwen.core.errors import RecipeError
from tongwen.core.i18n import _
from tongwen.recipe.references import references
from tongwen.recipe.schema import Recipe

RESTARTS = 3
PORT = 29500
SAVE_SECONDS = 300  # between Slurm's SIGTERM, at which a checkpoint is written, and the end of the time limit
MOUNT = "/workspace"
RUNTIME = "torch-distributed"  # the runtime for torchrun that Kubeflow Trainer installs

SLURM = """\
#!/bin/bash
# {comment}
#SBATCH --job-name={name}
#SBATCH --nodes={nodes}
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node={devices}
#SBATCH --signal=TERM@{save_seconds}
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output={name}-%j.log
set -euo pipefail
cd {folder}
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
srun --kill-on-bad-exit torchrun --nnodes={nodes} --nproc-per-node={devices} --max-restarts={restarts} \\
  --rdzv-id="$SLURM_JOB_ID" --rdzv-backend=c10d --rdzv-endpoint="$head:{port}" \\
  {command}
"""


@dataclass(frozen=True)
class Job:
    """One run of a recipe on several machines.

    name: of DNS's letters; folder: where the job runs, the current one; recipe: its path from there; devices: processes on
    each machine; inputs: files and models that the recipe names.
    """

    name: str
    folder: Path
    recipe: str
    overrides: tuple[str, ...]
    devices: int
    nodes: int
    inputs: tuple[str, ...]

    @property
    def command(self) -> str:
        """What torchrun starts, for a shell in the job's folder."""
        return shlex.join(["-m", "tongwen", "run", self.recipe, *self.overrides])

    @property
    def comment(self) -> str:
        return _("{recipe} on {nodes} x {devices} GPUs; `out` must lie where all machines see it").format(
            recipe=self.recipe, nodes=self.nodes, devices=self.devices
        )


def make_job(recipe: Recipe, file: str, overrides: Sequence[str], devices: int | None, nodes: int) -> Job:
    """Raises RecipeError if the processes are not as many as the recipe's `devices`."""
    if devices is None:
        if recipe.devices != 1 and recipe.devices % nodes:  # 1: the recipe leaves it open
            raise RecipeError(
                _("{devices} processes cannot be shared out to {nodes} machines").format(
                    devices=recipe.devices, nodes=nodes
                ),
                place=f"devices: {recipe.devices}",
                remedy=_("--devices N: processes on each machine"),
            )
        devices = max(1, recipe.devices // nodes)
    if recipe.devices not in (1, devices * nodes):
        raise RecipeError(
            _("the job has {nodes} x {devices} processes, the recipe asks for {wanted}").format(
                nodes=nodes, devices=devices, wanted=recipe.devices
            ),
            place=f"devices: {recipe.devices}",
            remedy=f"devices={devices * nodes}",
        )
    name = re.sub(r"[^a-z0-9]+", "-", recipe.name.lower()).strip("-")[:50].strip("-") or "tongwen"
    folder, path = Path.cwd(), Path(file).absolute()
    return Job(
        name=name,
        folder=folder,
        recipe=str(path.relative_to(folder) if path.is_relative_to(folder) else path),
        overrides=tuple(overrides),
        devices=devices,
        nodes=nodes,
        inputs=(file, *(one.value for one in references(recipe) if one.is_read)),
    )


def run(job: Job, scheduler: str, out: str, *, gpu: str, image: str, volume: str) -> int:
    """Write the job's file, and say how it is submitted.

    Raises RecipeError if the recipe lies outside of the folder that is sent to the machines."""
    if scheduler != "slurm":
        _check_sent(job)
    if scheduler == "slurm":
        text, submit = _slurm(job), f"sbatch {shlex.quote(out)}"
    elif scheduler == "skypilot":
        text, submit = _as_yaml(job, _skypilot(job, gpu)), f"sky jobs launch {shlex.quote(out)}"
    else:
        text, submit = _as_yaml(job, _kubeflow(job, image, volume)), f"kubectl create -f {shlex.quote(out)}"
    originals.write_new(Path(out), text, job.inputs)
    console.success(out)
    console.info(f"  {submit}")
    console.emit({"out": out, "name": job.name, "devices": job.devices, "nodes": job.nodes, "submit": submit})
    return 0


def _check_sent(job: Job) -> None:
    """Refuse a recipe that the machines do not get, and name the files that they do not get."""
    if Path(job.recipe).is_absolute():
        raise RecipeError(
            _("the machines see the current folder, and the recipe lies outside of it"),
            place=job.recipe,
            remedy=f"cd {shlex.quote(str(Path(job.recipe).parent))}",
        )
    for name in job.inputs:
        if Path(name).is_absolute():
            console.notice(_("{path}: the machines need this path, too").format(path=name))


def _slurm(job: Job) -> str:
    return SLURM.format(
        comment=job.comment,
        name=job.name,
        nodes=job.nodes,
        devices=job.devices,
        restarts=RESTARTS,
        port=PORT,
        save_seconds=SAVE_SECONDS,
        folder=shlex.quote(str(job.folder)),
        command=job.command,
    )


def _skypilot(job: Job, gpu: str) -> dict[str, Any]:
    """Return a task of SkyPilot: https://docs.skypilot.co/en/latest/reference/yaml-spec.html"""
    asked = f"{gpu}+" if re.fullmatch(r"\d+GB", gpu) else gpu
    return {
        "name": job.name,
        "num_nodes": job.nodes,
        "workdir": str(job.folder),
        "resources": {"accelerators": f"{asked}:{job.devices}", "job_recovery": {"max_restarts_on_errors": RESTARTS}},
        "setup": "pip install tongwen\n",
        "run": (
            'head=$(echo "$SKYPILOT_NODE_IPS" | head -n 1)\n'
            f'torchrun --nnodes="$SKYPILOT_NUM_NODES" --nproc-per-node={job.devices} --max-restarts={RESTARTS} \\\n'
            f'  --rdzv-id={job.name} --rdzv-backend=c10d --rdzv-endpoint="$head:{PORT}" \\\n'
            f"  {job.command}\n"
        ),
    }


def _kubeflow(job: Job, image: str, volume: str) -> dict[str, Any]:
    """Return a TrainJob of Kubeflow Trainer v2, whose torch runtime tells torchrun machines and meeting point (PET_*)."""
    start = f"cd {MOUNT} && torchrun --max-restarts={RESTARTS} {job.command}"
    trainer = {
        "numNodes": job.nodes,
        "numProcPerNode": job.devices,
        "resourcesPerNode": {"limits": {"nvidia.com/gpu": str(job.devices)}},
        "command": ["bash", "-c", start if image else f"pip install tongwen && {start}"],
    }
    spec = {"runtimeRef": {"name": RUNTIME}, "trainer": {**({"image": image} if image else {}), **trainer}}
    if volume:
        spec["runtimePatches"] = [_mount(volume)]
    else:
        console.notice(
            _("no --volume: the job has no folder {mount}; name the volume claim that holds recipe and data").format(
                mount=MOUNT
            )
        )
    return {
        "apiVersion": "trainer.kubeflow.org/v1alpha1",
        "kind": "TrainJob",
        "metadata": {"generateName": f"{job.name}-"},
        "spec": spec,
    }


def _mount(claim: str) -> dict[str, Any]:
    """Return the patch of the runtime that mounts a volume claim in the machines' containers."""
    pod = {
        "volumes": [{"name": "workspace", "persistentVolumeClaim": {"claimName": claim}}],
        "containers": [{"name": "node", "volumeMounts": [{"name": "workspace", "mountPath": MOUNT}]}],
    }
    of_job = {"name": "node", "template": {"spec": {"template": {"spec": pod}}}}
    jobs = {"template": {"spec": {"replicatedJobs": [of_job]}}}
    return {"manager": "tongwen.io/launch", "trainingRuntimeSpec": jobs}


class _Dumper(yaml.SafeDumper):
    """Writes texts of several lines as they are read."""

    def represent_str(self, data: str) -> yaml.ScalarNode:
        return self.represent_scalar("tag:yaml.org,2002:str", data, style="|" if "\n" in data else None)


_Dumper.add_representer(str, _Dumper.represent_str)


def _as_yaml(job: Job, data: dict[str, Any]) -> str:
    return f"# {job.comment}\n" + yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)
