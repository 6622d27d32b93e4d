"""Runs that a visitor of the page starts, continues and stops.

A recipe in the folders of the page is its owner's and is trusted, as in the terminal. What a visitor changes is not: what a
change names must be in these folders, and no change names another machine, a secret or arguments of another library.
"""

from __future__ import annotations

import glob
import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from tongwen.core.errors import MachineError, RecipeError, TongwenError
from tongwen.core.i18n import _
from tongwen.recipe.load import load_recipe
from tongwen.recipe.references import Reference, references
from tongwen.recipe.schema import Recipe
from tongwen.workflows import run_manager
from tongwen.workflows.run_lock import lock_holder
from tongwen.workflows.workspace import Workspace, display_path

MAX_RUNS = 4  # at the same time, in the folders of the page
_starting = threading.Lock()


def start(workspace: Workspace, name: str, changes: Sequence[str]) -> str:
    """Start a recipe with a visitor's changes. Returns the run's name."""
    file = workspace.recipe(name)
    out = workspace.inside(read_changed(workspace, file, changes).out)
    _start(workspace, [str(file), *changes], out)
    return display_path(out)


def resume(workspace: Workspace, name: str) -> None:
    """Continue a run with the recipe in its folder. Raises RecipeError if that recipe writes to another folder, MachineError
    if the run is finished."""
    out = workspace.run(name)
    if run_manager.is_finished(out):
        raise MachineError(_("this run is finished: there is nothing to resume"), place=display_path(out))
    file = workspace.inside(str(out / "recipe.yaml"))
    if workspace.inside(load_recipe(file)[0].out) != out:
        raise RecipeError(_("the recipe of this run writes to another folder"), place=str(file))
    _start(workspace, [str(file)], out)


def stop(workspace: Workspace, name: str) -> None:
    """Ask the process that holds the lock of a run to end. Raises MachineError if none does."""
    run_manager.stop(workspace.run(name))


def read_changed(workspace: Workspace, file: Path, changes: Sequence[str]) -> Recipe:
    """Return the recipe with the changes. Raises RecipeError if they name what the page may not access."""
    own: set[str] = set()  # what the recipe itself names
    with suppress(TongwenError):  # it may hold together only with the changes
        own |= {one.value for one in references(load_recipe(file, on_file=own.add)[0])}

    def check(one: Reference) -> None:
        if one.value not in own:
            _check(workspace, one)

    changed, _unused = load_recipe(file, changes, lambda name: check(Reference("engine", "file", name)))
    for one in references(changed):
        check(one)
    return changed


def _check(workspace: Workspace, one: Reference) -> None:
    try:
        if one.kind in ("address", "arguments"):
            raise RecipeError(_("change this in the recipe, not here"))
        if one.kind == "model":
            workspace.model(one.value)
        elif one.kind == "file" or any(mark in one.value for mark in "./\\~"):
            if glob.has_magic(one.value) and ".." in Path(one.value).parts:
                raise RecipeError(_("change this in the recipe, not here"))
            workspace.inside(one.value)
    except RecipeError as error:
        raise RecipeError(error.rule, place=f"{one.key}: {one.value[:200]}", remedy=error.remedy) from None


def _start(workspace: Workspace, arguments: Sequence[str], out: Path) -> None:
    with _starting:
        if sum(lock_holder(Path(name)) is not None for name in workspace.runs()) >= MAX_RUNS:
            raise MachineError(
                _("{count} runs are in progress; the page starts no more at the same time").format(count=MAX_RUNS),
                remedy=_("wait for one, or stop one"),
            )
        run_manager.start(arguments, out)
