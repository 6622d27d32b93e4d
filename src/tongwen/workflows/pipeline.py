"""The river: a recipe's stages in their order, each once. What is finished is left alone, what changed is refused.

A stage is a module in `tongwen.stages` with `settings(recipe)`, what decides its result, and `run(recipe, out)`; one with
`check_ahead(recipe)` is asked before any runs.
"""

from __future__ import annotations

import importlib
import json
import os
import platform
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from tongwen.core import artifact, console, distributed, resume
from tongwen.core.errors import MachineError, RecipeError, TongwenError, first_line, is_disk_full
from tongwen.core.i18n import say
from tongwen.recipe.data import Prepare
from tongwen.recipe.load import dump
from tongwen.recipe.schema import STAGES, Recipe
from tongwen.train import trackers

TRAINING = ("pretrain", "sft")  # stages that run on all devices
PATIENCE_SECONDS = 300  # without sign of a first process
LOCK = ".lock"  # held by the process that runs in a folder, whose number it says
MODELS = ("vocab", "pretrain", "sft", "merge")  # stages that leave a model, each standing on the one before


class LaunchFailed(TongwenError):
    """The processes of a launched stage failed; they have said why."""

    def __init__(self, code: int) -> None:
        super().__init__("")
        self.exit_code = code


def run(
    recipe: Recipe,
    arguments: Sequence[str],
    *,
    only: str = "",
    start: str = "",
    until: str = "",
    again: bool = False,
    fork: bool = False,
) -> list[artifact.Artifact]:
    """Run the chosen stages; returns their artifacts. arguments: recipe file and overrides, for launched processes.

    Raises RecipeError when a finished or interrupted stage was made with other settings, and for `again` and `fork` in several processes.
    """
    distributed.begin()
    if (again or fork) and distributed.is_launched():
        flag, many = "--again" if again else "--fork", distributed.world_size()
        raise RecipeError(
            say(
                f"what is there is moved aside or rewritten, which {many} processes cannot do at once",
                f"要移开或改写已有的内容，{many} 个进程无法同时做",
            ),
            place=flag,
            remedy=say(
                f"tongwen run RECIPE {flag} --devices {many}; or rename the folders of {recipe.out}, and launch without it",
                f"tongwen run RECIPE {flag} --devices {many}；或先给 {recipe.out} 下的文件夹改名，再不带它启动",
            ),
        )
    chosen = choose(recipe, only, start, until)
    check_launcher(recipe)
    out = Path(recipe.out)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise MachineError(
            say(f"cannot be made: {error.strerror}", f"无法创建：{error.strerror}"), place=str(out)
        ) from None
    done: list[artifact.Artifact] = []
    with _alone(out), distributed.listening(distributed.interrupt):
        redo_from = _first_to_redo(recipe, chosen, out, explicit=bool(only or start)) if again else None
        redone = STAGES[STAGES.index(redo_from) :] if redo_from else ()
        if not distributed.is_launched():
            left = [name for name in chosen if name in redone or not _find_unchanged(recipe, name, out, fork)]
            check_processes(recipe, left)
            _check_devices(recipe, left)
            if {*left} & {*TRAINING}:
                trackers.check(recipe.track)
            check_ahead(recipe, left)
        if distributed.is_first() and not distributed.is_ours():
            left = [name for name in chosen if name in redone or not artifact.find(out / name)]
            prepared = None if "prepare" in redone else artifact.find(out / "prepare")
            if prepared and {*left} & {*TRAINING}:
                _stage("prepare").check_made(prepared)
            (out / "recipe.yaml").write_text(dump(recipe), encoding="utf-8")
        for name in chosen:
            path = out / name
            if name in redone:
                _put_aside(path)
            elif (found := _find_unchanged(recipe, name, out, fork)) is not None:
                console.good(say(f"{name}: already done", f"{name}：已完成"))
                done.append(found)
                continue
            try:
                done.append(_run_stage(recipe, name, path, arguments))
            except Exception as error:
                if is_disk_full(error) and not isinstance(error, TongwenError):
                    raise _disk_full(path, error) from error
                raise
    return done


def _disk_full(path: Path, error: Exception) -> MachineError:
    return MachineError(
        say(f"the disk is full: {first_line(error)}", f"磁盘已满：{first_line(error)}"),
        place=str(path),
        remedy=say(
            "free some space, and the same command continues; or another disk: out=FOLDER",
            "清理空间后用同一命令继续；或换一个磁盘：out=文件夹",
        ),
    )


def check_ahead(recipe: Recipe, stages: Sequence[str]) -> None:
    """Raise what would refuse one of these stages only when its turn comes."""
    for name in stages:
        if check := getattr(_stage(name), "check_ahead", None):
            check(recipe)


def check_launcher(recipe: Recipe) -> None:
    """Raise RecipeError when a launcher has started another number of processes than the recipe says."""
    if distributed.is_launched() and recipe.devices not in (1, world := distributed.world_size()):
        raise RecipeError(
            say(f"the launcher has started {world} processes", f"启动器启动了 {world} 个进程"),
            place=f"devices: {recipe.devices}",
            remedy=f"tongwen run RECIPE devices={world}",
        )
    if (
        os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true"
        and not distributed.is_launched()
        and recipe.devices == 1
    ):
        console.notice(
            say(
                "`accelerate launch --cpu` starts one process, whatever --num_processes says; several: --devices N",
                "`accelerate launch --cpu` 只启动一个进程，与 --num_processes 无关；多进程请用 --devices N",
            )
        )


def check_processes(recipe: Recipe, stages: Sequence[str]) -> None:
    """Raise RecipeError for an engine of several processes that would be alone."""
    for name in stages:
        if name in TRAINING and getattr(recipe, name).engine == "ddp" and recipe.devices == 1:
            raise RecipeError(
                say("this engine runs in several processes", "该引擎需要多个进程"),
                place=f"{name}.engine: ddp",
                remedy="tongwen run RECIPE --devices 2; torchrun, accelerate launch, deepspeed, srun: docs/engines.md",
            )


def _check_devices(recipe: Recipe, stages: Sequence[str]) -> None:
    """Raise MachineError for more processes than this machine has GPUs."""
    if recipe.devices == 1 or not set(stages) & set(TRAINING):
        return
    from tongwen.model.loading.load import count_devices

    count = count_devices()
    if count and recipe.devices > count:
        raise MachineError(
            say(f"this machine shows {count} GPUs, one for each process", f"本机可见 {count} 块 GPU，每个进程需要一块"),
            place=f"devices: {recipe.devices}",
            remedy=f"--devices {count}",
        )


def choose(recipe: Recipe, only: str, start: str, until: str) -> list[str]:
    """The recipe's stages, narrowed by the command's words. Raises RecipeError when a word names none of them."""
    stages = recipe.stages
    for flag, name in (("--only", only), ("--from", start), ("--until", until)):
        if name and name not in stages:
            raise RecipeError(
                say(f"{name!r} is no stage of this recipe", f"该配方没有阶段 {name!r}"),
                place=flag,
                remedy=say("it has: ", "现有：") + ", ".join(stages),
            )
    if only:
        return [only]
    first = stages.index(start) if start else 0
    last = stages.index(until) if until else len(stages) - 1
    if not stages:
        raise RecipeError(
            say("this recipe has no stage to run", "该配方没有可运行的阶段"),
            place=recipe.name,
            remedy=say("add a section: ", "请添加一段：") + ", ".join(STAGES),
        )
    return stages[first : last + 1]


def standing_on(recipe: Recipe, stage: str, *, finished: bool = False) -> str:
    """The model that a stage stands on: what the last stage before it left, else the recipe's base. finished: of the stages
    that have run, for those who only look."""
    before = [name for name in MODELS if name in recipe.stages and STAGES.index(name) < STAGES.index(stage)]
    for name in reversed(before):
        folder = Path(recipe.out) / name
        if not finished or artifact.find(folder):
            return str(folder)
    return recipe.base


def open_model_before(recipe: Recipe, stage: str) -> artifact.Artifact:
    """What a stage after all training stands on, finished. Raises ArtifactError when it is not."""
    place = Path(standing_on(recipe, stage))
    return artifact.open_artifact(place, "model" if recipe.merge else place.name)


def inputs(recipe: Recipe) -> Prepare:
    """What `prepare` reads, for those who only look: rows that `synthesize` has yet to make are left out, and said."""
    assert recipe.prepare
    made = Path(recipe.out) / "synthesize" / "dialogues.jsonl"
    if recipe.synthesize is None or made.exists():
        return recipe.prepare
    console.notice(say("what synthesize is to make is not there yet", "synthesize 的数据尚未生成"))
    there = [source for source in recipe.prepare.dialogues if Path(source.path) != made]
    return recipe.prepare.model_copy(update={"dialogues": there})


def prepared(recipe: Recipe) -> artifact.Artifact | None:
    """What `prepare` has made of this recipe's data, if it would be the same today; for those who only look."""
    found = artifact.find(Path(recipe.out) / "prepare")
    return None if found is None or _changed(recipe, "prepare", found) else found


def _settings(recipe: Recipe, name: str) -> dict[str, Any]:
    return dict(json.loads(json.dumps(_stage(name).settings(recipe))))


def _stage(name: str) -> Any:
    return importlib.import_module(f"tongwen.stages.{name}")


def _find_unchanged(recipe: Recipe, name: str, out: Path, fork: bool) -> artifact.Artifact | None:
    """The finished stage, or None when it is still to be run. Raises RecipeError when what is there, finished or interrupted,
    was made with other settings."""
    found = artifact.find(out / name)
    if found is not None:
        artifact.refuse_changed(str(out / name), _changed(recipe, name, found), resume.again())
    elif name in TRAINING and not distributed.is_launched() and (prepared := artifact.find(out / "prepare")):
        resume.check(
            artifact.partial_of(out / name),
            _settings(recipe, name),
            prepared.fingerprint,
            fork=fork,
            takes_new_rates=getattr(recipe, name).sharded_by != "deepspeed",
        )
    return found


def _run_stage(recipe: Recipe, name: str, path: Path, arguments: Sequence[str]) -> artifact.Artifact:
    needs_group = name in TRAINING and (recipe.devices > 1 or getattr(recipe, name).sharded_by)
    if needs_group and not distributed.is_launched():
        code = distributed.torchrun(recipe.devices, ["run", *arguments, "--only", name])
        if code:
            raise LaunchFailed(code)
        return artifact.open_artifact(path, name)
    if distributed.is_first():
        result: artifact.Artifact = _stage(name).run(recipe, path)
        return result
    if name in TRAINING:
        _stage(name).run(recipe, path)
    return _wait_for(path)


def _wait_for(path: Path) -> artifact.Artifact:
    """Under a launcher the first process alone runs what is not training, and writes what is; the others wait for its folder.
    When the first one fails, most launchers end them. Raises MachineError when nobody has held the lock for a while."""
    seen = time.monotonic()
    while (found := artifact.find(path)) is None:
        if _is_held(path.parent):
            seen = time.monotonic()
        elif time.monotonic() - seen > PATIENCE_SECONDS:
            raise MachineError(
                say("the first process has ended without it", "首个进程已结束，而它没有完成"),
                place=str(path),
                remedy=say("its message tells why; the same command continues", "原因见其信息；用同一命令可以继续"),
            )
        time.sleep(0.5)
    return found


def _is_held(out: Path) -> bool:
    """Whether a process runs in a folder, as far as can be seen: of another machine, one that was killed counts as running."""
    if os.name == "nt":
        return True
    try:
        node = (out / LOCK).read_text(encoding="utf-8").split(",")[0]
    except OSError:
        return False
    return bool(node) and (node != platform.node() or holder(out) is not None)


def _changed(recipe: Recipe, name: str, found: artifact.Artifact) -> list[tuple[str, Any, Any]]:
    """Differing settings, files that have changed, and parents that have been made anew since."""
    changed = resume.differences(found.manifest["settings"], _settings(recipe, name))
    parents = [parent["fingerprint"] for parent in found.manifest["parents"].values() if "fingerprint" in parent]
    below = artifact.find(Path(standing_on(recipe, name)))
    if below and below.fingerprint in parents:  # the same one, elsewhere
        changed = [one for one in changed if one[0] != "base"]
    if changed_files := getattr(_stage(name), "changed_files", None):
        changed += changed_files(recipe, found.manifest)
    for role, parent in found.manifest["parents"].items():
        now = artifact.find(Path(parent["path"])) if parent.get("kind") else None
        if now is not None and now.fingerprint != parent["fingerprint"]:
            changed.append((f"{role} (fingerprint)", parent["fingerprint"][:12], now.fingerprint[:12]))
    return changed


def _first_to_redo(recipe: Recipe, chosen: list[str], out: Path, *, explicit: bool) -> str:
    """Where `--again` begins: at the stage that was named, else at the first that changed, else at the first."""
    if not explicit:
        for name in chosen:
            found = artifact.find(out / name)
            if found is None or _changed(recipe, name, found):
                return name
    return chosen[0]


def _put_aside(path: Path) -> None:
    for place in (path, artifact.partial_of(path)):
        aside = artifact.put_aside(place)
        if aside:
            console.notice(say(f"{place.name} is kept as {aside.name}", f"{place.name} 保留为 {aside.name}"))


@contextmanager
def _alone(out: Path) -> Iterator[None]:
    """One run at a time in a folder: the first process of a run holds its lock, unless the command that started it does.
    Raises MachineError, naming who holds it."""
    if not distributed.is_first() or distributed.is_ours() or os.name == "nt":
        yield
        return
    import fcntl

    with (out / LOCK).open("a+", encoding="utf-8") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            stream.seek(0)
            owner = stream.read().strip()
            raise MachineError(
                say(
                    f"another tongwen is running in this folder: {owner}, or what it has launched",
                    f"另一个 tongwen 正在此文件夹中运行：{owner}，或由它启动的进程",
                ),
                place=str(out),
                remedy=say("wait for it, or choose another `out`", "请等待，或换一个 `out`"),
            ) from None
        os.set_inheritable(stream.fileno(), True)  # processes that it launches may still be saving when it is killed
        stream.truncate(0)
        stream.write(f"{platform.node()}, process {os.getpid()}, since {time.strftime('%Y-%m-%d %H:%M:%S')}\n")
        stream.flush()
        try:
            yield
        finally:
            stream.truncate(0)


def holder(out: Path) -> int | None:
    """The process of this machine that runs in a folder. The number that a killed one left there counts for nothing."""
    try:
        lock = out / LOCK
        node, number, *_ = lock.read_text(encoding="utf-8").split(", ")
        process = psutil.Process(int(number.removeprefix("process ")))
        alive = process.status() != psutil.STATUS_ZOMBIE and process.create_time() <= lock.stat().st_mtime + 1.0
        return process.pid if alive and node == platform.node() else None
    except (OSError, ValueError, psutil.Error):
        return None
