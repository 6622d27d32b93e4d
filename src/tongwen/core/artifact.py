"""Artifacts: the output folders of stages. A folder is built next to its final path and renamed when it is complete.

A folder without a manifest is not an artifact. The manifest records its kind, its parents (with fingerprints), its
settings and the versions of the libraries. A finished folder is never written to again.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from tongwen import __version__
from tongwen.core.console import human_bytes
from tongwen.core.distributed import is_main_process
from tongwen.core.errors import ArtifactError, MachineError, RecipeError, first_line
from tongwen.core.i18n import _

MANIFEST = "manifest.json"
OURS = {"kind", "fingerprint", "parents", "settings"}  # keys of which a damaged manifest of ours still has two
MARK = ".tongwen"  # in a working folder: tongwen made it, and may empty it
OLD_MARKS = ("run.json", "parts", ".fetch", "journal.jsonl")  # in the working folders of v0.1, which have no mark
VERSIONS_OF = ("torch", "transformers", "peft", "accelerate", "tokenizers", "safetensors")


@dataclass(frozen=True)
class Artifact:
    """A finished folder and its manifest."""

    path: Path
    manifest: dict[str, Any]

    @property
    def kind(self) -> str:
        return str(self.manifest["kind"])

    @property
    def fingerprint(self) -> str:
        return str(self.manifest["fingerprint"])

    def as_parent(self) -> dict[str, Any]:
        return {"path": str(self.path), "kind": self.kind, "fingerprint": self.fingerprint}


def find(path: Path) -> Artifact | None:
    """Return the artifact at a path, or None when none exists: a manifest.json of another program makes none.

    Raises ArtifactError when the manifest is damaged.
    """
    file = path / MANIFEST
    if not is_artifact(path):
        return None
    remedy = _("run the stage again with --again")
    manifest = read_json(file, remedy)
    if problem := _problem_of(manifest):
        raise ArtifactError(
            _("the manifest is damaged: {problem}").format(problem=problem), place=str(file), remedy=remedy
        )
    return Artifact(path, manifest)


def is_artifact(folder: Path) -> bool:
    """Whether a folder has a manifest of ours, which may be damaged."""
    try:
        content = (folder / MANIFEST).read_bytes()
    except OSError:
        return False
    try:
        manifest = json.loads(content)
    except (ValueError, RecursionError):
        return b'"kind"' in content or b'"fingerprint"' in content
    return isinstance(manifest, dict) and len(OURS & manifest.keys()) > 1


def _problem_of(manifest: Mapping[str, Any]) -> str:
    """Return what keeps a manifest from being one of ours; empty for a sound one."""
    kinds = {"kind": str, "fingerprint": str, "parents": dict, "settings": dict}
    wrong = [name for name, kind in kinds.items() if not isinstance(manifest.get(name), kind) or manifest[name] == ""]
    if not wrong and not all(isinstance(parent, dict) for parent in manifest["parents"].values()):
        wrong = ["parents"]
    optional: dict[str, tuple[Any, Any]] = {"versions": ({}, dict), "seconds": (0, (int, float))}
    wrong += [name for name, (absent, kind) in optional.items() if not isinstance(manifest.get(name, absent), kind)]
    return ", ".join(wrong)


def open_artifact(path: Path, kind: str) -> Artifact:
    """Return the finished artifact at a path. Raises ArtifactError when it is missing, unfinished or of another kind."""
    found = find(path)
    if found is None:
        unfinished = partial_of(path).exists()
        raise ArtifactError(
            _("this stage has not finished") if unfinished else _("this stage has not run"),
            place=str(path),
            remedy=f"tongwen run RECIPE --until {path.name}",
        )
    if found.kind != kind:
        raise ArtifactError(
            _("this is a {found_kind} artifact, {kind} is needed").format(found_kind=found.kind, kind=kind),
            place=str(path),
        )
    return found


def partial_of(path: Path) -> Path:
    return path.with_name(path.name + ".partial")


def check_working(path: Path) -> None:
    """Raise RecipeError when the name of a working folder is taken by a file or folder that tongwen did not make."""
    working = partial_of(path)
    if not os.path.lexists(working):
        return
    if working.is_dir() and not working.is_symlink():
        names = {file.name for file in working.iterdir()}
        if not names or names & {MARK, *OLD_MARKS} or is_artifact(working):
            return
    raise RecipeError(
        _("the work is done under this name, but tongwen did not make it"),
        place=str(working),
        remedy=_("move it away, or choose another output"),
    )


def empty(working: Path) -> None:
    """Delete the content of a working folder, which keeps its mark."""
    if working.exists():
        shutil.rmtree(working)
    working.mkdir(parents=True)
    (working / MARK).touch()


@contextmanager
def create(
    path: Path,
    kind: str,
    parents: Mapping[str, Any],
    settings: Mapping[str, Any],
    *,
    resumable: bool = False,
    remove_on_error: bool = False,
) -> Iterator[Draft]:
    """Yield a draft in the working folder `PATH.partial`; rename it to PATH when the block ends without an error.

    resumable: keep an unfinished folder and continue in it (training); otherwise it is emptied first.
    remove_on_error: delete the working folder when the block fails: half of a model is large and useless.
    """
    working = partial_of(path)
    if is_main_process():
        check_working(path)
        if not resumable:  # a leftover that cannot be continued is deleted
            empty(working)
    working.mkdir(parents=True, exist_ok=True)  # whichever process comes first
    if is_main_process():
        (working / MARK).touch()
    draft = Draft(working, kind, dict(parents), dict(settings))
    try:
        yield draft
    except BaseException:
        if remove_on_error:
            shutil.rmtree(working, ignore_errors=True)
        raise
    if is_main_process():
        draft.finish(path)


class Draft:
    """An unfinished artifact. Set `fingerprint` and add to `facts` before the block ends."""

    def __init__(self, path: Path, kind: str, parents: dict[str, Any], settings: dict[str, Any]) -> None:
        self.path, self.kind, self.parents, self.settings = path, kind, parents, settings
        self.facts: dict[str, Any] = {}
        self.fingerprint = ""
        self.started = time.time()
        self.artifact: Artifact | None = None

    def record_files(self, chosen: Callable[[Path], bool]) -> None:
        """Record the sha256 of the chosen files, for `verify`. Tensors have their own entries in the fingerprint."""
        files = sorted(file for file in self.path.rglob("*") if file.is_file() and file.name != MARK and chosen(file))
        self.facts["files"] = {
            file.relative_to(self.path).as_posix(): {"bytes": file.stat().st_size, "sha256": hash_file(file)}
            for file in files
        }

    def finish(self, path: Path) -> None:
        """Sync all files to disk, write the manifest last, then rename the folder.

        The mark goes after the manifest is there: where a disk fails before, the same command may empty the folder.
        """
        manifest = {
            "kind": self.kind,
            "tongwen": __version__,
            "fingerprint": self.fingerprint or fingerprint_files(self.path),
            "parents": self.parents,
            "settings": self.settings,
            "versions": versions(),
            "machine": {"system": platform.platform(), "python": platform.python_version(), "cpus": os.cpu_count()},
            "seconds": round(time.time() - self.started, 3),
            "created": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            **self.facts,
            "sizes": self._sizes(),
        }
        sync_tree(self.path)
        write_json(self.path / MANIFEST, manifest)
        if os.path.lexists(path):
            raise ArtifactError(
                _("the finished stage cannot be moved here: the path exists"),
                place=str(path),
                remedy="--again",
            )
        (self.path / MARK).unlink(missing_ok=True)
        self.path.rename(path)
        sync_folder(path.parent)
        self.artifact = Artifact(path, manifest)

    def _sizes(self) -> dict[str, int]:
        """Return the bytes of each file. Checkpoints may be deleted when the stage is finished."""
        files = {file.relative_to(self.path): file for file in sorted(self.path.rglob("*")) if file.is_file()}
        passed = {"checkpoints", MARK, MANIFEST}
        return {name.as_posix(): file.stat().st_size for name, file in files.items() if name.parts[0] not in passed}


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any, Any]]:
    """Return (name, old value, new value) of every setting that differs; nested settings get dotted names."""
    out: list[tuple[str, Any, Any]] = []
    for key in sorted({*old, *new}):
        before, after = old.get(key), new.get(key)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            out += differences(before, after, f"{prefix}{key}.")
        elif before != after:
            out.append((prefix + key, before, after))
    return out


def refuse_changed(place: str, changed: list[tuple[str, Any, Any]], remedy: str) -> None:
    """Raise RecipeError with both values of every changed setting, if any changed."""
    if not changed:
        return
    lines = "; ".join(f"{name}: {before!r} → {after!r}" for name, before, after in changed)
    raise RecipeError(
        _("the existing result was made from different settings or data: {lines}").format(lines=lines),
        place=place,
        remedy=remedy,
    )


def check_disk(folder: Path, needed: int) -> None:
    """Raise MachineError when fewer than `needed` bytes of disk are free."""
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise MachineError(
            _("not enough disk space: {needed} needed, {free} free").format(
                needed=human_bytes(needed), free=human_bytes(free)
            ),
            place=str(folder),
            remedy=_("free some space, or use another disk: --out, in a recipe out=FOLDER"),
        )


def put_aside(path: Path) -> Path | None:
    """Rename a file or folder to a free name `NAME.old-K` and return it; None when the path does not exist."""
    if not os.path.lexists(path):
        return None
    number = 1
    while os.path.lexists(aside := path.with_name(f"{path.name}.old-{number}")):
        number += 1
    path.rename(aside)
    return aside


def versions() -> dict[str, str]:
    out = {}
    for name in VERSIONS_OF:
        try:
            out[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return out


def fingerprint_files(folder: Path) -> str:
    """Return the sha256 over names and bytes of all files in a folder except the manifest: for data artifacts."""
    return fingerprint_hashes(hash_files(folder))


def hash_files(folder: Path) -> dict[str, str]:
    """Return {relative name: sha256} of the files in a folder, without the manifest."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name not in (MANIFEST, MARK))
    return {str(file.relative_to(folder)): hash_file(file) for file in files}


def fingerprint_hashes(hashes: Mapping[str, str]) -> str:
    """Return the same fingerprint from known hashes, {name: sha256}."""
    digest = hashlib.sha256()
    for name in sorted(hashes, key=Path):
        digest.update(name.encode() + b"\0" + bytes.fromhex(hashes[name]))
    return digest.hexdigest()


def cache_folder() -> Path:
    """Return the user's cache folder for tongwen, XDG_CACHE_HOME or ~/.cache."""
    root = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(root) if Path(root).is_absolute() else Path.home() / ".cache") / "tongwen"


def hash_file(file: Path) -> str:
    """Return the sha256 of a file's bytes, read in blocks."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def read_json(file: Path, remedy: str = "") -> dict[str, Any]:
    """Return the JSON object in a file. Raises ArtifactError when the file holds none."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ArtifactError(
            _("not JSON: {error}").format(error=first_line(error)), place=str(file), remedy=remedy
        ) from None
    if not isinstance(found, dict):
        raise ArtifactError(_("not a JSON object"), place=str(file), remedy=remedy)
    return found


def write_json(file: Path, value: Any) -> None:
    """Write a value as indented JSON, atomically."""
    write_text(file, as_json(value))


def as_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, indent=1) + "\n"


def write_text(file: Path, text: str) -> None:
    """Write a temporary file, sync it to disk, rename it: a reader sees the old file or the new one, never half of one."""
    beside = file.with_name(file.name + ".partial")
    with beside.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    beside.replace(file)
    sync_folder(file.parent)


def sync_tree(folder: Path) -> None:
    """fsync every file and folder below, so that they survive a power cut."""
    for path in sorted(folder.rglob("*"), reverse=True):
        if path.is_file() and not path.is_symlink():
            sync_file(path)
        elif path.is_dir():
            sync_folder(path)
    sync_folder(folder)


def sync_folder(folder: Path) -> None:
    if os.name != "nt":  # Windows cannot open a folder
        sync_file(folder)


def sync_file(file: Path) -> None:
    handle = os.open(file, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
