"""The folders that the page was given, and what lies in them: models, recipes and runs. Nothing else is opened or written.

What a visitor names is looked up here first: a path counts when it lies in one of the folders after every link is followed.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tongwen.core.errors import RecipeError
from tongwen.core.i18n import _

DEEPEST = 5  # folders below a given one that are looked into
MOST = 500  # things of a kind that are listed
MODEL_MARKS = ("config.json", "adapter_config.json")


@dataclass(frozen=True)
class Workspace:
    """folders: resolved; named: models beyond them (hub ids, paths) that the command line named itself."""

    folders: tuple[Path, ...]
    named: tuple[str, ...] = ()

    @classmethod
    def of(cls, folders: Sequence[str], named: Sequence[str] = ()) -> Workspace:
        """Raises RecipeError for what is no folder."""
        for folder in folders:
            if not Path(folder).is_dir():
                raise RecipeError(_("this is not a folder"), place=folder)
        return cls(tuple(Path(folder).resolve() for folder in folders), tuple(named))

    def inside(self, name: str) -> Path:
        """The path of that name, whether or not anything stands there. Raises RecipeError when it leads out of the folders."""
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
        """A model's name, once it is sure that the page may open it."""
        return name if name in self.named else str(self.inside(name))

    def models(self) -> list[str]:
        found = [folder for folder in self._walk() if any((folder / mark).is_file() for mark in MODEL_MARKS)]
        files = [file for folder in self._walk() for file in sorted(folder.glob("*.gguf"))]
        return [*self.named, *map(display_path, [*found, *files][:MOST])]

    def recipes(self) -> list[str]:
        files = [
            file for folder in self._walk() for ending in ("yaml", "yml") for file in sorted(folder.glob(f"*.{ending}"))
        ]
        return [display_path(file) for file in files if _is_recipe(file)][:MOST]

    def runs(self) -> list[str]:
        """The newest first."""
        found = [folder for folder in self._walk() if _is_run(folder)]
        return [display_path(folder) for folder in sorted(found, key=_changed, reverse=True)][:MOST]

    def _walk(self) -> Iterator[Path]:
        for top in self.folders:
            for root, subfolders, _unused in os.walk(top):
                folder = Path(root)
                depth = len(folder.relative_to(top).parts)
                hidden = [name for name in subfolders if name.startswith((".", "__")) or depth >= DEEPEST]
                subfolders[:] = sorted(set(subfolders) - set(hidden))
                yield folder


def display_path(path: Path) -> str:
    """As short as it can be said from where the command was started."""
    cwd = Path.cwd()
    return str(path.relative_to(cwd)) if path.is_relative_to(cwd) and path != cwd else str(path)


def _is_run(folder: Path) -> bool:
    return (folder / "recipe.yaml").is_file() and (folder / ".lock").is_file()


def _is_recipe(file: Path) -> bool:
    """Whether a YAML file begins like a recipe; those that runs keep of themselves are no beginnings."""
    if _is_run(file.parent):
        return False
    with file.open("rb") as stream:
        lines = stream.read(1 << 16).splitlines()
    return any(line.startswith(b"base:") for line in lines) and any(line.startswith(b"name:") for line in lines)


def _changed(folder: Path) -> float:
    return (folder / "recipe.yaml").stat().st_mtime
