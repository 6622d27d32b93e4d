"""The folders that the web page may use, with their models, recipes and runs. Nothing else is opened or written.

Every path from a visitor is checked here first: after following all links, it must be inside one of these folders.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tongwen.core.errors import RecipeError
from tongwen.core.i18n import _

MAX_DEPTH = 5  # levels of subfolders that are searched
MAX_LISTED = 500  # most models, recipes or runs that are listed
MODEL_MARKS = ("config.json", "adapter_config.json")


@dataclass(frozen=True)
class Workspace:
    """folders: resolved paths; named: models outside them (hub ids, paths) that the command line allows."""

    folders: tuple[Path, ...]
    named: tuple[str, ...] = ()

    @classmethod
    def of(cls, folders: Sequence[str], named: Sequence[str] = ()) -> Workspace:
        """Return the workspace of these folders. Raises RecipeError if one is not a folder."""
        for folder in folders:
            if not Path(folder).is_dir():
                raise RecipeError(_("this is not a folder"), place=folder)
        return cls(tuple(Path(folder).resolve() for folder in folders), tuple(named))

    def inside(self, name: str) -> Path:
        """Return the resolved path, which need not exist. Raises RecipeError if it is outside the folders."""
        try:
            path = Path(name).resolve()
        except (OSError, ValueError):
            path = Path("/")
        if not any(path.is_relative_to(folder) for folder in self.folders):
            raise RecipeError(
                _("this is outside the folders that the page may access"),
                place=name[:200],
                remedy=" ".join(map(str, self.folders)),
            )
        return path

    def model(self, name: str) -> str:
        """Return the model's name or path. Raises RecipeError if the page may not open it."""
        return name if name in self.named else str(self.inside(name))

    def models(self) -> list[str]:
        found = [folder for folder in self._walk() if any((folder / mark).is_file() for mark in MODEL_MARKS)]
        files = [file for folder in self._walk() for file in sorted(folder.glob("*.gguf"))]
        return [*self.named, *map(display_path, [*found, *files][:MAX_LISTED])]

    def recipes(self) -> list[str]:
        files = [
            file for folder in self._walk() for ending in ("yaml", "yml") for file in sorted(folder.glob(f"*.{ending}"))
        ]
        return [display_path(file) for file in files if _is_recipe(file)][:MAX_LISTED]

    def runs(self) -> list[str]:
        """Return the runs, the newest first."""
        found = [folder for folder in self._walk() if _is_run(folder)]
        return [display_path(folder) for folder in sorted(found, key=_changed, reverse=True)][:MAX_LISTED]

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
