"""The folders that the web page may use, with their models, recipes and runs. Nothing else is opened or written.

Every path from a visitor passes `Workspace.inside`, or `Workspace.upload` for a file that was uploaded.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tongwen.core.allowed_paths import resolve_inside
from tongwen.core.errors import RecipeError
from tongwen.core.i18n import _

MAX_DEPTH = 5  # levels of subfolders that are searched
MAX_LISTED = 500  # most models, recipes or runs that are listed
MODEL_MARKS = ("config.json", "adapter_config.json")
RECIPE_SUFFIXES = (".yaml", ".yml")


@dataclass(frozen=True)
class Workspace:
    """folders: resolved paths; named: models outside them (hub ids, paths) that the command line allows; uploads: the
    resolved folder of the files that visitors send."""

    folders: tuple[Path, ...]
    named: tuple[str, ...] = ()
    uploads: Path | None = None

    @classmethod
    def of(cls, folders: Sequence[str], named: Sequence[str] = (), uploads: str = "") -> Workspace:
        """Return the workspace of these folders. Raises RecipeError if one is not a folder."""
        for folder in folders:
            if not Path(folder).is_dir():
                raise RecipeError(_("this is not a folder"), place=folder)
        return cls(
            tuple(Path(folder).resolve() for folder in folders),
            tuple(named),
            Path(uploads).resolve() if uploads else None,
        )

    def inside(self, name: str) -> Path:
        """Return the path without links; it need not exist. Raises RecipeError if it is outside the folders or hidden."""
        return resolve_inside(self.folders, name)

    def upload(self, name: str) -> Path:
        """Return the path of an uploaded file, without links. Raises RecipeError for any other path."""
        return resolve_inside((self.uploads,) if self.uploads else (), name)

    def model(self, name: str) -> str:
        """Return the model's name or path. Raises RecipeError if the page may not open it."""
        return name if name in self.named else str(self._existing(name))

    def recipe(self, name: str) -> Path:
        """Return the path of a recipe. Raises RecipeError for any other file."""
        file = self._existing(name)
        if file.suffix not in RECIPE_SUFFIXES or not file.is_file() or not _is_recipe(file):
            raise RecipeError(_("this is not a recipe"), place=name)
        return file

    def run(self, name: str) -> Path:
        """Return the folder of a run. Raises RecipeError for any other folder, and if a file of it leads outside."""
        folder = self._existing(name)
        if not _is_run(folder):
            raise RecipeError(_("this is not the folder of a run"), place=name)
        for file in (*folder.iterdir(), *folder.glob("*/*")):
            if file.is_symlink():
                self.inside(str(file))
        return folder

    def _existing(self, name: str) -> Path:
        path = self.inside(name)
        if not path.exists():
            raise RecipeError(_("this does not exist"), place=name)
        return path

    def models(self) -> list[str]:
        found = [folder for folder in self._walk() if any((folder / mark).is_file() for mark in MODEL_MARKS)]
        files = [file for folder in self._walk() for file in sorted(folder.glob("*.gguf"))]
        return [*self.named, *map(display_path, [*found, *files][:MAX_LISTED])]

    def recipes(self) -> list[str]:
        files = [
            file
            for folder in self._walk()
            for suffix in RECIPE_SUFFIXES
            for file in sorted(folder.glob(f"[!.]*{suffix}"))
        ]
        return [display_path(file) for file in files if self._holds(file) and _is_recipe(file)][:MAX_LISTED]

    def runs(self) -> list[str]:
        """Return the runs, the newest first."""
        found = [folder for folder in self._walk() if _is_run(folder)]
        return [display_path(folder) for folder in sorted(found, key=_changed, reverse=True)][:MAX_LISTED]

    def _holds(self, path: Path) -> bool:
        try:
            return self.inside(str(path)).is_file()
        except RecipeError:
            return False

    def _walk(self) -> Iterator[Path]:
        for top in self.folders:
            for root, subfolders, _unused in os.walk(top):
                folder = Path(root)
                depth = len(folder.relative_to(top).parts)
                hidden = [name for name in subfolders if name.startswith((".", "__")) or depth >= MAX_DEPTH]
                subfolders[:] = sorted(set(subfolders) - set(hidden))
                yield folder


def display_path(path: Path) -> str:
    """Return the path relative to the current folder if it is inside, else the whole path."""
    cwd = Path.cwd()
    return str(path.relative_to(cwd)) if path.is_relative_to(cwd) and path != cwd else str(path)


def _is_run(folder: Path) -> bool:
    return (folder / "recipe.yaml").is_file() and (folder / ".lock").is_file()


def _is_recipe(file: Path) -> bool:
    """Return whether a YAML file looks like a recipe; the resolved recipes in run folders do not count."""
    if _is_run(file.parent):
        return False
    with file.open("rb") as stream:
        lines = stream.read(1 << 16).splitlines()
    return any(line.startswith(b"base:") for line in lines) and any(line.startswith(b"name:") for line in lines)


def _changed(folder: Path) -> float:
    return (folder / "recipe.yaml").stat().st_mtime
