"""Run a recipe's stages in order. A finished stage is skipped; if its settings or inputs changed, it is refused."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from tongwen.core import artifact, console, distributed, resume
from tongwen.core.errors import MachineError, RecipeError, TongwenError, first_line, is_disk_full
from tongwen.core.i18n import _, ngettext
from tongwen.recipe.schema import STAGES, Recipe
from tongwen.workflows.finished import check_finished
from tongwen.workflows.prepared_data import changed_files, check_prepared
from tongwen.workflows.run_folder import check_folder, write_recipe
from tongwen.workflows.run_lock import is_locked, lock_folder
from tongwen.workflows.stage_inputs import TRAINING, base_of_stage

PATIENCE_SECONDS = 300  # that processes wait while no first process holds the lock


class Stage(Protocol):
    """One stage of a recipe. Its module does heavy imports inside functions: a finished stage needs only `settings`."""

    def settings(self, recipe: Recipe) -> dict[str, Any]:
        """Return the settings that decide its result: if one of them changes, a finished stage has to be redone."""

    def check_ahead(self, recipe: Recipe) -> None:
        """Raise now, before earlier stages run for hours, if this stage would fail later."""

    def run(self, recipe: Recipe, out: Path) -> artifact.Artifact:
        """Do the work and write the finished folder `out`."""


Stages = Mapping[str, Stage]
"""All stages by their section's name (`tongwen.stages.base.STAGES`)."""


class LaunchFailed(TongwenError):
    """The processes of a launched stage failed; they have printed the reason."""

    def __init__(self, code: int) -> None:
        super().__init__("")
        self.exit_code = code


def run(
    recipe: Recipe,
    arguments: Sequence[str],
    stages: Stages,
    *,
    only: str = "",
    start: str = "",
    until: str = "",
    again: bool = False,
    fork: bool = False,
    verify: bool = False,
) -> list[artifact.Artifact]:
    """Run the chosen stages; returns their artifacts.

    arguments: recipe file and overrides, for the processes that it launches. verify: compare the digests of finished
    stages, too; their sizes are always compared.

    Raises RecipeError if a finished or interrupted stage was made with other settings, and for `again` and `fork` in
    several processes.
    """
    distributed.record_start_time()
    if (again or fork) and distributed.is_launched():
        flag, count = "--again" if again else "--fork", distributed.world_size()
        raise RecipeError(
            _("this moves or rewrites existing folders; only one process may do that, and {many} are running").format(
                many=count
            ),
            place=flag,
            remedy=_(
                "tongwen run RECIPE {flag} --devices {many}; or rename the folders in {out}, then launch without this option"
            ).format(flag=flag, many=count, out=recipe.out),
        )
    chosen = choose(recipe, only, start, until)
    check_launcher(recipe)
    out = Path(recipe.out)
    if distributed.is_main_process() and not distributed.is_child_process():
        _check_originals(recipe, chosen, arguments, stages, again=again, explicit=bool(only or start))
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise MachineError(_("cannot be created: {strerror}").format(strerror=error.strerror), place=str(out)) from None
    done: list[artifact.Artifact] = []
    with lock_folder(out):
        redo_from = _first_to_redo(recipe, chosen, out, stages, explicit=bool(only or start)) if again else None
        redone = STAGES[STAGES.index(redo_from) :] if redo_from else ()
        if not distributed.is_launched():
            left = [name for name in chosen if name in redone or not _find_unchanged(recipe, name, out, stages, fork)]
            check_processes(recipe, left)
            _check_devices(recipe, left)
            if {*left} & {*TRAINING}:
                from tongwen.train import trackers

                trackers.check(recipe.track)
            check_ahead(recipe, left, stages)
        if distributed.is_main_process() and not distributed.is_child_process():
            left = [name for name in chosen if name in redone or not artifact.find(out / name)]
            prepared = None if "prepare" in redone else artifact.find(out / "prepare")
            if prepared and {*left} & {*TRAINING}:
                check_prepared(prepared)
            if left or not (out / "recipe.yaml").is_file():  # that of a finished run stays as its version wrote it
                write_recipe(recipe)
        for name in chosen:
            path = out / name
            if name in redone:
                _put_aside(path)
            elif (found := _find_unchanged(recipe, name, out, stages, fork)) is not None:
                check_finished(found, digests=verify)
                console.success(_("{name}: already done").format(name=name))
                done.append(found)
                continue
            try:
                done.append(_run_stage(recipe, name, path, arguments, stages))
            except Exception as error:
                if is_disk_full(error) and not isinstance(error, TongwenError):
                    raise _disk_full(path, error) from error
                raise
    return done


def _check_originals(
    recipe: Recipe, chosen: list[str], arguments: Sequence[str], stages: Stages, *, again: bool, explicit: bool
) -> None:
    """Raise RecipeError before anything is touched if the run would replace or move what tongwen did not write."""
    redo_from = _first_to_redo(recipe, chosen, Path(recipe.out), stages, explicit=explicit) if again else None
    redone = STAGES[STAGES.index(redo_from) :] if redo_from else ()
    names = [name for name in chosen if name in redone or not artifact.find(Path(recipe.out) / name)]
    check_folder(recipe, names, redone=redone, file=next(iter(arguments), ""))


def _disk_full(path: Path, error: Exception) -> MachineError:
    return MachineError(
        _("the disk is full: {error}").format(error=first_line(error)),
        place=str(path),
        remedy=_("free some space and run the same command to continue; or use another disk: out=FOLDER"),
    )


def check_ahead(recipe: Recipe, names: Sequence[str], stages: Stages) -> None:
    """Raise now if one of these stages would fail when its turn comes."""
    for name in names:
        stages[name].check_ahead(recipe)


def check_launcher(recipe: Recipe) -> None:
    """Raise RecipeError if a launcher started another number of processes than the recipe's `devices`."""
    if distributed.is_launched() and recipe.devices not in (1, world := distributed.world_size()):
        raise RecipeError(
            _("the launcher started {world} processes").format(world=world),
            place=f"devices: {recipe.devices}",
            remedy=f"tongwen run RECIPE devices={world}",
        )
    if (
        os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true"
        and not distributed.is_launched()
        and recipe.devices == 1
    ):
        console.notice(
            _("`accelerate launch --cpu` starts only one process and ignores --num_processes; for several: --devices N")
        )


def check_processes(recipe: Recipe, stages: Sequence[str]) -> None:
    """Raise RecipeError if `engine: ddp` would run in a single process."""
    for name in stages:
        if name in TRAINING and getattr(recipe, name).engine == "ddp" and recipe.devices == 1:
            raise RecipeError(
                _("this engine needs several processes"),
                place=f"{name}.engine: ddp",
                remedy="tongwen run RECIPE --devices 2; torchrun, accelerate launch, deepspeed, srun: docs/engines.md",
            )


def check_machine(recipe: Recipe, stages: Sequence[str]) -> None:
    """Raise MachineError if the recipe wants more processes than this machine can carry. Needs no torch."""
    most = distributed.most_processes()
    if set(stages) & set(TRAINING) and recipe.devices > most:
        raise MachineError(
            _("this machine has cores, GPUs and memory for {most} processes only").format(most=most),
            place=f"devices: {recipe.devices}",
            remedy=_("--devices {most}; for several machines: docs/engines.md").format(most=most),
        )


def _check_devices(recipe: Recipe, stages: Sequence[str]) -> None:
    """Raise MachineError if the recipe wants more processes than this machine can carry, or than it has GPUs."""
    check_machine(recipe, stages)
    if recipe.devices == 1 or not set(stages) & set(TRAINING):
        return
    from tongwen.model.loading.devices import count_devices

    count = count_devices()
    if count and recipe.devices > count:
        raise MachineError(
            ngettext(
                "this machine has {count} visible GPU; each process needs one",
                "this machine has {count} visible GPUs; each process needs one",
                count,
            ).format(count=count),
            place=f"devices: {recipe.devices}",
            remedy=f"--devices {count}",
        )


def choose(recipe: Recipe, only: str, start: str, until: str) -> list[str]:
    """Return the recipe's stages that --only, --from and --until select. Raises RecipeError for an unknown stage."""
    stages = recipe.stages
    for flag, name in (("--only", only), ("--from", start), ("--until", until)):
        if name and name not in stages:
            raise RecipeError(
                _("this recipe has no stage {name!r}").format(name=name),
                place=flag,
                remedy=_("it has: {names}").format(names=", ".join(stages)),
            )
    if only:
        return [only]
    first = stages.index(start) if start else 0
    last = stages.index(until) if until else len(stages) - 1
    if not stages:
        raise RecipeError(
            _("this recipe has no stage to run"),
            place=recipe.name,
            remedy=_("add a section: {names}").format(names=", ".join(STAGES)),
        )
    return stages[first : last + 1]


def _settings(recipe: Recipe, stage: Stage) -> dict[str, Any]:
    """Return the stage's settings as they are stored in a manifest."""
    return dict(json.loads(json.dumps(stage.settings(recipe))))


def _find_unchanged(recipe: Recipe, name: str, out: Path, stages: Stages, fork: bool) -> artifact.Artifact | None:
    """Return the finished stage, or None if it has to run. Raises RecipeError if a finished or interrupted stage was
    made with other settings."""
    found = artifact.find(out / name)
    if found is not None:
        artifact.refuse_changed(str(out / name), _changed(recipe, name, found, stages[name]), resume.rerun_hint())
    elif name in TRAINING and not distributed.is_launched() and (prepared := artifact.find(out / "prepare")):
        resume.check(
            artifact.partial_of(out / name),
            _settings(recipe, stages[name]),
            prepared.fingerprint,
            fork=fork,
            allows_new_settings=getattr(recipe, name).sharded_by != "deepspeed",
        )
    return found


def _run_stage(recipe: Recipe, name: str, path: Path, arguments: Sequence[str], stages: Stages) -> artifact.Artifact:
    needs_group = name in TRAINING and (recipe.devices > 1 or getattr(recipe, name).sharded_by)
    if needs_group and not distributed.is_launched():
        code = distributed.torchrun(recipe.devices, ["run", *arguments, "--only", name])
        if code:
            raise LaunchFailed(code)
        return artifact.open_artifact(path, name)
    if distributed.is_main_process():
        return stages[name].run(recipe, path)
    if name in TRAINING:
        stages[name].run(recipe, path)
    return _wait_for(path)


def _wait_for(path: Path) -> artifact.Artifact:
    """Wait for the folder that the first process writes.

    Under a launcher only the first process runs stages other than training, and only it writes results. If it fails,
    most launchers end the others. Raises MachineError if no process has held the lock for a while.
    """
    seen = time.monotonic()
    while (found := artifact.find(path)) is None:
        if is_locked(path.parent):
            seen = time.monotonic()
        elif time.monotonic() - seen > PATIENCE_SECONDS:
            raise MachineError(
                _("the first process ended without finishing it"),
                place=str(path),
                remedy=_("its message gives the reason; the same command continues"),
            )
        time.sleep(0.5)
    return found


def _changed(recipe: Recipe, name: str, found: artifact.Artifact, stage: Stage) -> list[tuple[str, Any, Any]]:
    """Return differing settings, changed files, and parents that were made again since."""
    changed = resume.differences(found.manifest["settings"], _settings(recipe, stage))
    parents = [parent["fingerprint"] for parent in found.manifest["parents"].values() if "fingerprint" in parent]
    below = artifact.find(Path(base_of_stage(recipe, name)))
    if below and below.fingerprint in parents:  # the same base in another folder
        changed = [one for one in changed if one[0] != "base"]
    if name == "prepare":
        changed += changed_files(recipe, found.manifest)
    for role, parent in found.manifest["parents"].items():
        now = artifact.find(Path(parent["path"])) if parent.get("kind") else None
        if now is not None and now.fingerprint != parent["fingerprint"]:
            changed.append((f"{role} (fingerprint)", parent["fingerprint"][:12], now.fingerprint[:12]))
    return changed


def _first_to_redo(recipe: Recipe, chosen: list[str], out: Path, stages: Stages, *, explicit: bool) -> str:
    """Return where `--again` begins: at the named stage, else at the first changed one, else at the first."""
    if not explicit:
        for name in chosen:
            found = artifact.find(out / name)
            if found is None or _changed(recipe, name, found, stages[name]):
                return name
    return chosen[0]


def _put_aside(path: Path) -> None:
    for folder in (path, artifact.partial_of(path)):
        aside = artifact.put_aside(folder)
        if aside:
            console.notice(_("{place} is kept as {aside}").format(place=folder.name, aside=aside.name))
