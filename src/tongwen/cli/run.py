"""The `tongwen run` command."""

from __future__ import annotations

import argparse

from tongwen.cli import recipe_arguments
from tongwen.core.i18n import _


def summary() -> str:
    return _("run the stages of a recipe")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    recipe_arguments.add_recipe(parser)
    parser.add_argument("--only", default="", metavar="STAGE", help=_("run only this stage"))
    parser.add_argument("--from", dest="start", default="", metavar="STAGE", help=_("start with this stage"))
    parser.add_argument("--until", default="", metavar="STAGE", help=_("stop after this stage"))
    recipe_arguments.add_devices(parser)
    parser.add_argument(
        "--again",
        action="store_true",
        help=_("redo changed stages and all later ones; the old folders are kept"),
    )
    parser.add_argument(
        "--fork",
        action="store_true",
        help=_("continue an interrupted stage with changed settings"),
    )
    parser.add_argument(
        "--verify",
        action="store_true",
        help=_("compare finished stages with the hashes in their manifests; without it, only the sizes of their files"),
    )


def run(arguments: argparse.Namespace) -> int:
    from tongwen.core import console
    from tongwen.stages.base import STAGES
    from tongwen.workflows import pipeline

    recipe = recipe_arguments.load(arguments)
    done = pipeline.run(
        recipe,
        [arguments.recipe, *recipe_arguments.overrides(arguments)],
        STAGES,
        only=arguments.only,
        start=arguments.start,
        until=arguments.until,
        again=arguments.again,
        fork=arguments.fork,
        verify=arguments.verify,
    )
    console.emit({"out": recipe.out, "stages": {found.path.name: found.manifest for found in done}})
    return 0
