"""Arguments of the commands that read a recipe, and the loaded recipe."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from tongwen.core.i18n import _

if TYPE_CHECKING:
    from tongwen.recipe.schema import Recipe


def add_recipe(parser: argparse.ArgumentParser) -> None:
    """Add the recipe file and overrides of its keys."""
    parser.add_argument("recipe", metavar="RECIPE", help=_("recipe file"))
    parser.add_argument(
        "overrides",
        nargs="*",
        default=[],  # without a default argparse counts them among the required arguments
        metavar="section.key=value",
        help=_("override a key of the recipe"),
    )


def add_devices(parser: argparse.ArgumentParser) -> None:
    """Add `--devices N`, another way to write the override `devices=N`."""
    parser.add_argument("--devices", type=int, help=_("processes, one per GPU"))


def overrides(arguments: argparse.Namespace) -> list[str]:
    """Return the overrides of the command line, including `--devices`."""
    devices = getattr(arguments, "devices", None)
    return [*arguments.overrides, *([f"devices={devices}"] if devices is not None else [])]


def load(arguments: argparse.Namespace) -> Recipe:
    """Load the recipe with its overrides; print the notices of the loader."""
    from tongwen.core import console, distributed
    from tongwen.recipe.load import load_recipe

    recipe, notices = load_recipe(arguments.recipe, overrides(arguments))
    for notice in (
        () if distributed.is_child_process() else notices
    ):  # the command that started this process has printed them
        console.notice(notice)
    return recipe
