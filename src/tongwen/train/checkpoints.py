"""Checkpoints: committed whole, verified before a run continues from one, and only as many as the recipe keeps.

Every process writes its files into a staging folder. The first one then brings them all to the disk, writes a manifest with
the size and sha256 of each, and renames the folder: what bears a checkpoint's name is whole, whenever the machine stopped.
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
STAGING = "staging"  # whatever is in it is no checkpoint: half written, or half deleted


def newest_checkpoint(folders: Sequence[Path], runs: Collection[str] = ()) -> Path | None:
    """The newest checkpoint that is whole, or None where there is none yet. Newer ones that are not are put aside, aloud.

    folders: of the phases in their order: what a phase has trained is in those of the next one, too. runs: the ids that
    this run has had; empty: any. Raises ArtifactError when checkpoints are there and none is whole.
    """
    problems: dict[Path, str] = {}
    for folder in reversed(folders):
        for path in sorted(_all_in(folder), key=step_of, reverse=True):
            problem = damage(path, runs)
            if problem is None:
                _put_aside(problems, path)
                return path
            problems[path] = problem
    if problems:
        raise ArtifactError(
            _("no checkpoint is intact: ") + "; ".join(f"{path.name}: {problem}" for path, problem in problems.items()),
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
    """What is wrong with a checkpoint: a missing or changed file, another run's; None when it is whole."""
    try:
        manifest = read_manifest(checkpoint)
        seal, files, run, step = manifest.pop("seal"), manifest["files"], manifest["run"], manifest["step"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return _("no readable {manifest}").format(manifest=MANIFEST)
    if seal != _seal(manifest):
        return _("{manifest} has changed").format(manifest=MANIFEST)
    if runs and run not in runs:
        return _("it belongs to a different run, {run}").format(run=run)
    if step != step_of(checkpoint):
        return _("it is the checkpoint of step {step}, renamed").format(step=step)
    for name, told in files.items():
        file = checkpoint / name
        try:
            size = file.stat().st_size
            if size != told["bytes"]:
                return _("{name} has {size} bytes instead of {bytes}").format(name=name, size=size, bytes=told["bytes"])
            if artifact.hash_file(file) != told["sha256"]:
                return _("{name} has changed").format(name=name)
        except FileNotFoundError:
            return _("{name} is missing").format(name=name)
        except OSError as error:
            return _("{name} cannot be read: {strerror}").format(name=name, strerror=error.strerror)
    return None


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    return dict(json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8")))


def last_of(folder: Path) -> str:
    """The last checkpoint, in words for a message."""
    last = max(_all_in(folder), key=step_of, default=None)
    if last is None:
        return _("there is no checkpoint yet")
    return _("the last checkpoint is {last}").format(last=last)


def _all_in(folder: Path) -> list[Path]:
    """Without somebody's copies of them."""
    return [path for path in folder.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()]


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.rsplit("-", 1)[1])


def stage(folder: Path) -> None:
    """Make the empty place where the next checkpoint is written; what a dead process left there goes."""
    if (folder / STAGING).exists():
        shutil.rmtree(folder / STAGING)
    (folder / STAGING).mkdir(parents=True)


def commit(staged: Path, folder: Path, told: Mapping[str, Any], keep: int, best: int | None = None) -> None:
    """Make a checkpoint in the staging folder the newest, then drop the oldest beyond `keep`; that of step `best` stays.

    Called by one process when all have written. told: what the manifest says besides the files, `run` at least.
    """
    files = sorted(file for file in staged.rglob("*") if file.is_file())
    manifest = {
        **told,
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
    others = (path for path in _all_in(folder) if step_of(path) != best or path == target)
    for old in sorted(others, key=step_of, reverse=True)[keep:]:
        old.rename(folder / STAGING / old.name)  # first it stops being a checkpoint, then it goes
    shutil.rmtree(folder / STAGING, ignore_errors=True)


def _seal(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def check_space(folder: Path, model: Any) -> None:
    """Raise MachineError when there is no room for one more checkpoint: what learns with two moments in fp32 (which is
    more than every other optimizer keeps), and of a whole model also what is frozen."""
    folder.mkdir(parents=True, exist_ok=True)
    whole, needed = not hasattr(model, "peft_config"), 64 << 20
    for _unused, part in model.named_parameters(remove_duplicate=whole):  # peft saves both names of a tied copy
        needed += _numbers(part) * (4 if part.requires_grad else whole * part.element_size())
    needed += sum(8 * _numbers(part) for part in model.parameters() if part.requires_grad)
    artifact.check_disk(folder, needed)


def _numbers(part: torch.nn.Parameter) -> int:
    return int(getattr(part, "ds_numel", part.numel()))  # ZeRO-3 leaves none in the parameter itself


def check_adapter_saved(folder: Path) -> None:
    """Raise ArtifactError when an adapter file holds no tensors (443 bytes in 2023), only empty ones (ZeRO-3's shards that
    were not gathered), or is not there."""
    file = folder / "adapter_model.safetensors"
    if not (folder / "adapter_config.json").is_file():
        return
    from safetensors import safe_open

    if not file.is_file():
        raise ArtifactError(_("the adapter was saved without weights"), place=str(folder))
    with safe_open(str(file), "pt") as tensors:
        filled = [0 not in tensors.get_slice(name).get_shape() for name in tensors.keys()]  # noqa: SIM118
    kind = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8")).get("peft_type")
    if not (any(filled) if kind == "ADALORA" else filled and all(filled)):  # which empties ranks on purpose
        raise ArtifactError(_("the saved adapter is empty"), place=str(file))
