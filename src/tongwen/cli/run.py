"""The `tongwen run` command."""

from __future__ import annotations

import argparse

from tongwen.cli import recipe_arguments
from tongwen.core.i18n import say


def summary() -> str:
    return say("run the stages of a recipe", "运行配方中的各阶段")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    recipe_arguments.add_recipe(parser)
    parser.add_argument("--only", default="", metavar="STAGE", help=say("this stage alone", "只运行这一阶段"))
    parser.add_argument(
        "--from", dest="start", default="", metavar="STAGE", help=say("this stage and the later ones", "从这一阶段起")
    )
    parser.add_argument("--until", default="", metavar="STAGE", help=say("up to this stage", "到这一阶段止"))
    recipe_arguments.add_devices(parser)
    parser.add_argument(
        "--again",
        action="store_true",
        help=say(
            "redo what changed and all after it; the old folders are kept", "重做已改变的阶段及其后各阶段；旧文件夹保留"
        ),
    )
    parser.add_argument(
        "--fork",
        action="store_true",
        help=say("continue an interrupted stage with changed settings", "以改变后的设置继续被中断的阶段"),
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
    )
    console.emit({"out": recipe.out, "stages": {found.path.name: found.manifest for found in done}})
    return 0
