"""The `tongwen check` command."""

from __future__ import annotations

import argparse

from tongwen.cli import recipe_arguments
from tongwen.core.i18n import say


def summary() -> str:
    return say("read the recipe and the data; no model, no torch", "读配方与数据；不需要模型与 torch")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    recipe_arguments.add_recipe(parser)


def run(arguments: argparse.Namespace) -> int:
    from tongwen.commands import check

    return check.run(recipe_arguments.load(arguments))
