"""Checkpoints: committed whole, verified before a run continues from one, and only as many as the recipe keeps."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from tongwen import artifact, console
from tongwen.errors import ArtifactError
from tongwen.language import say

DIGESTS = "digests.json"


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint whose every file has the digest that was recorded; damaged ones are put aside, aloud."""
    for path in sorted(folder.glob("checkpoint-*"), key=step_of, reverse=True):
        problem = damage(path)
        if problem is None:
            return path
        aside = path.with_name(f"damaged-{path.name}")
        shutil.rmtree(aside, ignore_errors=True)
        path.rename(aside)
        console.notice(
            say(
                f"{path.name} is damaged ({problem}); put aside as {aside.name}",
                f"{path.name} 已损坏（{problem}），改名为 {aside.name}",
            )
        )
    return None


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint: a missing or changed file; None when it is whole."""
    try:
        digests = json.loads((checkpoint / DIGESTS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return say(f"no readable {DIGESTS}", f"{DIGESTS} 不可读")
    for name, digest in digests.items():
        file = checkpoint / name
        if not file.is_file():
            return say(f"{name} is missing", f"缺少 {name}")
        if artifact.hash_file(file) != digest:
            return say(f"{name} has changed", f"{name} 已改变")
    return None


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.rsplit("-", 1)[1])


def commit(staged: Path, folder: Path, keep: int, best: int | None = None) -> None:
    """Make a staged checkpoint the newest, then drop the oldest beyond `keep`; the one of step `best` stays."""
    digests = {
        str(file.relative_to(staged)): artifact.hash_file(file) for file in sorted(staged.rglob("*")) if file.is_file()
    }
    artifact.sync_tree(staged)
    artifact.write_json(staged / DIGESTS, digests)
    target = folder / staged.name
    if target.exists():
        shutil.rmtree(target)
    staged.rename(target)
    artifact.sync_folder(folder)
    shutil.rmtree(staged.parent, ignore_errors=True)
    others = (path for path in folder.glob("checkpoint-*") if step_of(path) != best or path == target)
    for old in sorted(others, key=step_of, reverse=True)[keep:]:
        (old / DIGESTS).unlink(missing_ok=True)  # first it stops being a checkpoint, then it goes
        shutil.rmtree(old)


def check_adapter_saved(folder: Path) -> None:
    """Raise ArtifactError when an adapter file holds no tensors (443 bytes in 2023), or there is none."""
    file = folder / "adapter_model.safetensors"
    if not (folder / "adapter_config.json").is_file():
        return
    from safetensors import safe_open

    if not file.is_file():
        raise ArtifactError(say("the adapter was saved without weights", "保存的适配器没有权重"), place=str(folder))
    with safe_open(str(file), "pt") as tensors:
        names = list(tensors.keys())
    if not names:
        raise ArtifactError(say("the saved adapter is empty", "保存的适配器为空"), place=str(file))
