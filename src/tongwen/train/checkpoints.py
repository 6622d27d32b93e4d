"""Commit checkpoints atomically, verify them before a run continues, and delete the oldest.

Every process writes its files into a staging folder. The first process then syncs them to the disk, writes a manifest with
the size and sha256 of each, and renames the folder. A folder named checkpoint-* is complete, whenever the machine stopped.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from tongwen.core import artifact, console
from tongwen.core.distributed import is_main_process
from tongwen.core.errors import ArtifactError
from tongwen.core.i18n import _

MANIFEST = "checkpoint.json"
STAGING = "staging"  # holds half-written and half-deleted checkpoints


def newest_checkpoint(folders: Sequence[Path], runs: Collection[str] = ()) -> Path | None:
    """Return the newest intact checkpoint, or None when there is no checkpoint. Rename newer damaged ones, with a notice.

    folders: checkpoint folders of the phases in order; a later phase's checkpoint includes what earlier ones trained
    runs:    the ids this run has had; empty: any
    Raises ArtifactError when there are checkpoints and none is intact.
    """
    problems: dict[Path, str] = {}
    for folder in reversed(folders):
        for path in sorted(_checkpoints_in(folder), key=step_of, reverse=True):
            problem = damage(path, runs)
            if problem is None:
                _put_aside(problems, path)
                return path
            problems[path] = problem
    if problems:
        raise ArtifactError(
            _("no checkpoint is intact: {problems}").format(
                problems=_("; ").join(f"{path.name}: {problem}" for path, problem in problems.items())
            ),
            place=str(next(iter(problems)).parent),
            remedy=_("--again starts over and keeps this folder under another name"),
        )
    return None


def _put_aside(problems: Mapping[Path, str], found: Path) -> None:
    for path, problem in problems.items():
        aside = path.with_name(f"damaged-{path.name}")
        console.notice(
            _("{path} is damaged ({problem}); renamed to {aside}").format(
                path=path.name, problem=problem, aside=aside.name
            )
        )
        if is_main_process():
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)
    if problems:
        lost = max((step_of(path) for path in problems if path.parent == found.parent), default=0) - step_of(found)
        console.notice(
            _("continuing from {found}: {lost} steps are lost").format(found=found.name, lost=lost)
            if lost > 0
            else _("continuing from where {found} ended").format(found=found.parent.name)
        )


def damage(checkpoint: Path, runs: Collection[str] = ()) -> str | None:
    """Return what is wrong with a checkpoint (a missing or changed file, a different run), or None when it is intact."""
    try:
        manifest = read_manifest(checkpoint)
        seal, files, run, step = manifest.pop("seal"), manifest["files"], manifest["run"], manifest["step"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return _("no readable {manifest}").format(manifest=MANIFEST)
    if seal != _seal(manifest):
        return _("{manifest} has changed").format(manifest=MANIFEST)
    if runs and run not in runs:
        return _("it belongs to a different run, {run}").format(run=run)
    if step != step_of(checkpoint):
        return _("it is the checkpoint of step {step}, renamed").format(step=step)
    for name, expected in files.items():
        file = checkpoint / name
        try:
            size = file.stat().st_size
            if size != expected["bytes"]:
                return _("{name} has {size} bytes instead of {bytes}").format(
                    name=name, size=size, bytes=expected["bytes"]
                )
            if artifact.hash_file(file) != expected["sha256"]:
                return _("{name} has changed").format(name=name)
        except FileNotFoundError:
            return _("{name} is missing").format(name=name)
        except OSError as error:
            return _("{name} cannot be read: {strerror}").format(name=name, strerror=error.strerror)
    return None


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    return dict(json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8")))


def describe_last(folder: Path) -> str:
    """Return a clause for messages that names the last checkpoint."""
    last = max(_checkpoints_in(folder), key=step_of, default=None)
    if last is None:
        return _("there is no checkpoint yet")
    return _("the last checkpoint is {last}").format(last=last)


def _checkpoints_in(folder: Path) -> list[Path]:
    """Return the folders named checkpoint-N, without copies under other names."""
    return [path for path in folder.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()]


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.rsplit("-", 1)[1])


def prepare_staging(folder: Path) -> None:
    """Create an empty staging folder; delete what a dead process left in it."""
    if (folder / STAGING).exists():
        shutil.rmtree(folder / STAGING)
    (folder / STAGING).mkdir(parents=True)


def commit(staged: Path, folder: Path, metadata: Mapping[str, Any], keep: int, best: int | None = None) -> None:
    """Commit a staged checkpoint, then delete the oldest ones beyond `keep`, but never that of step `best`.

    Called by one process when all have written. metadata: the manifest's other entries; `run` is required.
    """
    files = sorted(file for file in staged.rglob("*") if file.is_file())
    manifest = {
        **metadata,
        "step": step_of(staged),
        "files": {
            file.relative_to(staged).as_posix(): {"bytes": file.stat().st_size, "sha256": artifact.hash_file(file)}
            for file in files
        },
    }
    artifact.sync_tree(staged)
    artifact.write_json(staged / MANIFEST, {**manifest, "seal": _seal(manifest)})
    target = folder / staged.name
    staged.rename(target)
    artifact.sync_folder(folder)
    others = (path for path in _checkpoints_in(folder) if step_of(path) != best or path == target)
    for old in sorted(others, key=step_of, reverse=True)[keep:]:
        old.rename(folder / STAGING / old.name)  # renamed first, so that a half-deleted one is no checkpoint
    shutil.rmtree(folder / STAGING, ignore_errors=True)


def _seal(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def check_space(folder: Path, model: Any) -> None:
    """Raise MachineError when the disk has no space for one more checkpoint.

    Its size: trainable tensors with two fp32 moments (no other optimizer keeps more), plus the frozen ones of a whole model.
    """
    folder.mkdir(parents=True, exist_ok=True)
    whole, needed = not hasattr(model, "peft_config"), 64 << 20
    for _unused, part in model.named_parameters(remove_duplicate=whole):  # peft saves both names of a tied copy
        needed += _numbers(part) * (4 if part.requires_grad else whole * part.element_size())
    needed += sum(8 * _numbers(part) for part in model.parameters() if part.requires_grad)
    artifact.check_disk(folder, needed)


def _numbers(part: torch.nn.Parameter) -> int:
    return int(getattr(part, "ds_numel", part.numel()))  # ZeRO-3 leaves none in the parameter itself


def check_adapter_saved(folder: Path) -> None:
    """Raise ArtifactError when an adapter file is missing, has no tensors (443 bytes in 2023), or has empty ones.

    Empty tensors come from ZeRO-3 shards that were not gathered.
    """
    file = folder / "adapter_model.safetensors"
    if not (folder / "adapter_config.json").is_file():
        return
    from safetensors import safe_open

    if not file.is_file():
        raise ArtifactError(_("the adapter was saved without weights"), place=str(folder))
    with safe_open(str(file), "pt") as tensors:
        filled = [0 not in tensors.get_slice(name).get_shape() for name in tensors.keys()]  # noqa: SIM118
    kind = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8")).get("peft_type")
    if not (any(filled) if kind == "ADALORA" else filled and all(filled)):  # AdaLoRA empties ranks on purpose
        raise ArtifactError(_("the saved adapter is empty"), place=str(file))
