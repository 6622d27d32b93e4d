"""Checkpoints: committed atomically, verified before a run continues, and older ones as a fallback."""

from __future__ import annotations

import errno
import os
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tongwen.core import artifact
from tongwen.core.errors import ArtifactError, MachineError
from tongwen.train.checkpoints import MANIFEST, STAGING, check_space, commit, damage, newest_checkpoint, prepare_staging

TOLD = {"run": "a1", "settings": {"sft": {"rank": 4}}, "identity": {"base": "00ff"}}


def make(folder: Path, step: int, keep: int = 2, best: int | None = None, run: str = "a1") -> Path:
    prepare_staging(folder)
    staged = folder / STAGING / f"checkpoint-{step}"
    (staged / "ranks").mkdir(parents=True)
    (staged / "optimizer.pt").write_bytes(bytes([step]) * 100)
    (staged / "ranks" / "0.bin").write_bytes(bytes([step]) * 50)
    commit(staged, folder, {**TOLD, "run": run}, keep, best)
    return folder / f"checkpoint-{step}"


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_damaged_checkpoint_falls_back_to_the_previous_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for step in (1, 2, 4):
        newest = make(tmp_path, step)
    assert names(tmp_path) == ["checkpoint-2", "checkpoint-4"]
    assert newest_checkpoint([tmp_path]) == newest and capsys.readouterr().out == ""
    file = newest / "ranks" / "0.bin"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    assert newest_checkpoint([tmp_path]) == tmp_path / "checkpoint-2"
    out = capsys.readouterr().out
    assert "checkpoint-4 is damaged (ranks/0.bin has changed)" in out and "2 steps are lost" in out
    assert names(tmp_path) == ["checkpoint-2", "damaged-checkpoint-4"]
    (tmp_path / "checkpoint-2" / "optimizer.pt").unlink()
    for _ in range(2):
        with pytest.raises(ArtifactError, match=r"checkpoint-2: optimizer.pt is missing[\s\S]*--again"):
            newest_checkpoint([tmp_path])


@pytest.mark.parametrize(
    "what",
    ["delete", "empty", "cut", "other step", "flip", "zero tail", "no manifest", "other run", "unreadable", "renamed"],
)
def test_each_kind_of_damage_is_named(what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    newest, other = make(tmp_path, 7), make(tmp_path / "other", 9, run="b2")
    file = newest / "optimizer.pt"
    whole = file.read_bytes()
    damages = {
        "delete": file.unlink,
        "empty": lambda: file.write_bytes(b""),
        "cut": lambda: file.write_bytes(whole[:50]),
        "other step": lambda: shutil.copy(other / "optimizer.pt", file),
        "flip": lambda: file.write_bytes(whole[:10] + b"\x06" + whole[11:]),
        "zero tail": lambda: file.write_bytes(whole[:50] + bytes(50)),
        "no manifest": (newest / MANIFEST).unlink,
        "other run": lambda: (shutil.rmtree(newest), shutil.copytree(other, newest)),
        "unreadable": lambda: refuse_to_read(monkeypatch),
        "renamed": lambda: (shutil.rmtree(newest), make(tmp_path, 5).rename(newest)),
    }
    expected = {"delete": "missing", "empty": "0 bytes", "cut": "50 bytes", "no manifest": MANIFEST, "other run": "b2"}
    expected |= {"unreadable": "cannot be read: Input/output error", "renamed": "step 5, renamed"}
    assert damage(newest, {"a1"}) is None
    damages[what]()
    assert expected.get(what, "optimizer.pt has changed") in str(damage(newest, {"a1"}))


def refuse_to_read(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(file: Path) -> str:
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(file))

    monkeypatch.setattr(artifact, "hash_file", fail)


def test_phase_without_intact_checkpoint_restarts_from_previous_phase(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = (make(tmp_path / name, step) for name, step in (("phase-1", 6), ("phase-2", 3)))
    folders = [first.parent, second.parent, tmp_path / "phase-3"]
    (first / "optimizer.pt").unlink()
    assert newest_checkpoint(folders) == second and capsys.readouterr().out == "", "what is before it is in it"
    shutil.rmtree(first)
    make(first.parent, 6)
    (second / "optimizer.pt").unlink()
    assert newest_checkpoint(folders) == first
    out = capsys.readouterr().out
    assert "checkpoint-3 is damaged (optimizer.pt is missing)" in out and "from where phase-1 ended" in out
    assert names(second.parent) == ["damaged-checkpoint-3"]


def test_every_flipped_bit_is_found(tmp_path: Path) -> None:
    """Also in the manifest, which contains its own hash."""
    newest, chance = make(tmp_path, 3), random.Random(0)
    files = [newest / MANIFEST, newest / "optimizer.pt"]
    for _ in range(200):
        file = chance.choice(files)
        whole = file.read_bytes()
        place = chance.randrange(len(whole))
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << chance.randrange(8)]) + whole[place + 1 :])
        assert damage(newest) is not None, (file, place)
        file.write_bytes(whole)
    assert damage(newest) is None


def test_files_are_synced_before_the_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The order of syncs: every file and folder, the manifest, the rename, the parent folder."""
    done: list[str] = []
    sync, rename = os.fsync, Path.rename

    def note_sync(handle: int) -> None:
        done.append(str(Path(f"/proc/self/fd/{handle}").readlink()).removeprefix(f"{tmp_path}/"))
        sync(handle)

    def note_rename(self: Path, target: Any) -> Path:
        done.append(f"{self.name} → {Path(target).name}")
        return rename(self, target)

    monkeypatch.setattr(os, "fsync", note_sync)
    monkeypatch.setattr(Path, "rename", note_rename)
    make(tmp_path, 5)
    staged = f"{STAGING}/checkpoint-5"
    assert set(done[:4]) == {f"{staged}/{name}" for name in ("optimizer.pt", "ranks", "ranks/0.bin")} | {staged}
    assert done[4:] == [f"{staged}/{MANIFEST}.partial", staged, "checkpoint-5 → checkpoint-5", str(tmp_path)]


def test_latest_and_best_checkpoints_are_kept(tmp_path: Path) -> None:
    for step in range(1, 6):
        make(tmp_path, step, keep=1, best=2)
        assert damage(tmp_path / f"checkpoint-{step}") is None
    assert names(tmp_path) == ["checkpoint-2", "checkpoint-5"]
    (tmp_path / STAGING / "checkpoint-6").mkdir(parents=True)  # a process died here
    assert newest_checkpoint([tmp_path]) == tmp_path / "checkpoint-5"
    make(tmp_path, 6, keep=1)
    assert names(tmp_path) == ["checkpoint-6"]


def test_full_disk_is_detected_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    model = torch.nn.Linear(1000, 1000)
    check_space(tmp_path, model)
    monkeypatch.setattr(artifact.shutil, "disk_usage", lambda folder: usage._replace(free=(64 << 20) + 11_000_000))
    with pytest.raises(MachineError, match="not enough disk space"):
        check_space(tmp_path, model)
    for part in model.parameters():  # ZeRO-3 leaves the numbers elsewhere
        part.ds_numel, part.data = part.numel(), torch.empty(0)
    with pytest.raises(MachineError, match="not enough disk space"):
        check_space(tmp_path, model)
    model.requires_grad_(False)
    check_space(tmp_path, model)
