"""The `tongwen plan` command."""

from __future__ import annotations

import argparse

from tongwen.cli import recipe_arguments
from tongwen.core.i18n import say


def summary() -> str:
    return say(
        "batch sizes, tokens, steps, memory, disk, time; writes nothing",
        "批大小、token、步数、内存、磁盘与时间；不写任何东西",
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    recipe_arguments.add_recipe(parser)
    parser.add_argument(
        "--gpu",
        metavar="24GB",
        help=say("plan for a GPU with this much memory, which need not be here", "假设有这么大显存的 GPU"),
    )
    recipe_arguments.add_devices(parser)
    parser.add_argument(
        "--measure",
        action="store_true",
        help=say("open the model and time a micro-batch here", "打开模型，在本机实测一个微批的用时"),
    )


def run(arguments: argparse.Namespace) -> int:
    from tongwen.commands import plan
    from tongwen.stages.base import STAGES

    return plan.run(recipe_arguments.load(arguments), arguments.gpu, STAGES, measure=arguments.measure)
