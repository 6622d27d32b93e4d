"""The `tongwen check` command."""

from __future__ import annotations

import argparse

from tongwen.cli import recipe_arguments
from tongwen.core.i18n import _


def summary() -> str:
    return _("check the recipe and the data; needs neither a model nor torch")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    recipe_arguments.add_recipe(parser)


def run(arguments: argparse.Namespace) -> int:
    from tongwen.commands import check

    return check.run(recipe_arguments.load(arguments))
