"""The user's files stay: what may become an output, and what may be replaced or moved.

An output is no input, lies in no model or adapter folder, and moves no input away. What tongwen did not write is neither
replaced nor moved. Each command asks here before it touches anything.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import re
import secrets
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from tongwen.core import artifact
from tongwen.core.errors import MachineError, RecipeError
from tongwen.core.i18n import _

# Files of which one is enough: the folder is a model's or an adapter's. A config.json must name a model.
MODEL_FILES = (
    "adapter_config.json",
    "adapter_model.safetensors",
    "adapter_model.bin",
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "consolidated.00.pth",
    "consolidated.safetensors",
)
SEAL = re.compile(rb"tongwen sha256:([0-9a-f]{64})\b")
YAML, HTML = "# {}", "<!-- {} -->"  # a comment in each format


def check_output(out: Path, inputs: Iterable[str] = (), *, moves: bool = False, inside: bool = False) -> None:
    """Raise RecipeError if a file or folder must not be written here. Only looks.

    inputs: what the command reads: paths, globs and names of models, of which those that exist count.
    moves:  whether an existing `out` would be renamed (`--again`), with all that it holds.
    inside: whether `out` is an existing folder into which files are written.
    """
    places = _places(out)
    for place in places:
        for folder in (place, *place.parents) if inside else place.parents:
            if is_model_folder(folder):
                raise _refuse(out, _("this lies in a model's folder: {folder}").format(folder=folder))
    for name in inputs:
        for one in _existing(name):
            if one in places or (out.exists() and one.samefile(out)):
                raise _refuse(out, _("this is an input of the same command: {name}").format(name=name))
            if moves and any(one.is_relative_to(place) for place in places):
                raise _refuse(out, _("--again would move an input away: {name}").format(name=name))
            if moves and one.is_dir() and any(place.is_relative_to(one) for place in places):
                raise _refuse(out, _("this lies in an input: {name}").format(name=name))
    if moves and out.exists() and any(Path.cwd().is_relative_to(place) for place in places):
        raise _refuse(out, _("--again would move the current folder away"))


def clear_path(
    path: Path, inputs: Iterable[str], *, again: bool, is_ours: Callable[[Path], bool] | None = None
) -> None:
    """Make way for a new file or folder: raise RecipeError when the path exists; with `again`, rename what exists.

    is_ours: whether tongwen wrote what exists; by default, whether it is a folder with our manifest.
    """
    check_output(path, inputs, moves=again)
    if path.name in ("", ".."):
        raise _refuse(path, _("this names no new file or folder"))
    artifact.check_working(path)
    if path.is_dir() and not path.is_symlink() and not any(path.iterdir()):
        path.rmdir()
    elif not os.path.lexists(path):
        return
    elif not again:
        raise RecipeError(
            _("this already exists"),
            place=str(path),
            remedy=_("choose another, or use --again to keep it under another name"),
        )
    elif not (is_ours or artifact.is_artifact)(path):
        raise _refuse(path, _("tongwen did not write this, so --again does not move it"))
    artifact.put_aside(path)


def write_new(file: Path, text: str, inputs: Iterable[str] = ()) -> None:
    """Write a file that does not exist, or has this text already. Raises RecipeError for any other file."""
    check_new(file, text, inputs)
    if not os.path.lexists(file):
        _write(file, text.encode("utf-8"), replaces=False)


def check_new(file: Path, text: str | None = None, inputs: Iterable[str] = ()) -> None:
    """Raise RecipeError if `write_new` would. text: of a file that may exist."""
    check_output(file, inputs)
    if os.path.lexists(file) and (text is None or not file.is_file() or file.read_bytes() != text.encode("utf-8")):
        raise _refuse(file, _("this already exists"))


def write_sealed(file: Path, text: str, comment: str, inputs: Iterable[str] = (), *, replaces: bool = False) -> None:
    """Write a file whose first line is a comment with the hash of the others; replace only such a file, unchanged.

    replaces: the caller knows that an existing file is ours.
    """
    if not replaces:
        check_sealed(file, inputs)
    content = text.encode("utf-8")
    seal = comment.format(f"tongwen sha256:{hashlib.sha256(content).hexdigest()}")
    _write(file, seal.encode("utf-8") + b"\n" + content, replaces=os.path.lexists(file))


def check_sealed(file: Path, inputs: Iterable[str] = ()) -> None:
    """Raise RecipeError if `write_sealed` would."""
    check_output(file, inputs)
    if os.path.lexists(file) and not is_sealed(file):
        rule = _("this already exists, and tongwen did not write it, or it was changed since")
        raise _refuse(file, rule, _("move it away, or choose another output"))


def is_sealed(file: Path) -> bool:
    """Whether `write_sealed` wrote this file, and nobody changed it since."""
    if file.is_symlink() or not file.is_file():
        return False
    head, _unused, content = file.read_bytes().partition(b"\n")
    found = SEAL.search(head)
    return bool(found) and found[1] == hashlib.sha256(content).hexdigest().encode()  # type: ignore[index]


def is_model_folder(folder: Path) -> bool:
    """Whether a folder holds a model or an adapter, or is a model's or data set's folder in the cache of a hub."""
    if any(os.path.lexists(folder / name) for name in MODEL_FILES):
        return True
    if folder.name.startswith(("models--", "datasets--")) and (folder / "snapshots").is_dir():
        return True
    try:
        config = json.loads((folder / "config.json").read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(config, dict) and bool(config.get("model_type") or config.get("architectures"))


def _places(path: Path) -> set[Path]:
    """Return a path with all links followed, and with the last one kept: a new name is made beside the latter."""
    try:
        real = Path(os.path.realpath(path))
        return {real, Path(os.path.realpath(path.parent)) / path.name} if path.name not in ("", "..") else {real}
    except ValueError:
        raise RecipeError(_("a path cannot contain a NUL"), place=repr(str(path))) from None


def _existing(name: str) -> Iterator[Path]:
    """Yield the real paths that an input's name stands for. An adapter of ours needs the base that it was trained on."""
    if not name:
        return
    path = Path(name).expanduser() if name.startswith("~/") else Path(name)
    for one in [str(path)] if os.path.exists(path) else glob.glob(str(path), recursive=True):  # noqa: PTH110, PTH207
        place = Path(os.path.realpath(one))
        yield place
        if (place / "adapter_config.json").is_file() and artifact.is_artifact(place):
            made = artifact.find(place)
            base = made.manifest["parents"].get("base", {}).get("path", "") if made else ""
            yield from _existing(base) if base else ()


def _write(file: Path, content: bytes, *, replaces: bool) -> None:
    """Write a temporary file, sync it, and give it its name, which no file gets that another process just wrote."""
    beside = file.with_name(f".{file.name}.{secrets.token_hex(4)}.partial")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with beside.open("xb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        if replaces:
            beside.replace(file)
        else:
            _rename_new(beside, file)
        artifact.sync_folder(file.parent)
    except FileExistsError:
        raise _refuse(file, _("this already exists")) from None
    except NotADirectoryError:
        raise MachineError(_("one of its folders is a file"), place=str(file)) from None
    finally:
        beside.unlink(missing_ok=True)


def _rename_new(beside: Path, file: Path) -> None:
    try:
        os.link(beside, file)
    except FileExistsError:
        raise
    except OSError:  # a file system without hard links
        beside.rename(file)


def _refuse(place: Path, rule: str, remedy: str = "") -> RecipeError:
    return RecipeError(rule, place=str(place), remedy=remedy or _("choose another output"))
