"""The `tongwen plan` command."""

from __future__ import annotations

import argparse

from tongwen.cli import recipe_arguments
from tongwen.core.i18n import _


def summary() -> str:
    return _("show batches, tokens, steps, memory, disk and time; writes nothing")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    recipe_arguments.add_recipe(parser)
    parser.add_argument(
        "--gpu",
        metavar="24GB",
        help=_("plan for a GPU with this much memory, even if this machine has none"),
    )
    recipe_arguments.add_devices(parser)
    parser.add_argument(
        "--measure",
        action="store_true",
        help=_("open the model and time a micro-batch on this machine"),
    )


def run(arguments: argparse.Namespace) -> int:
    from tongwen.commands import plan
    from tongwen.stages.base import STAGES

    return plan.run(recipe_arguments.load(arguments), arguments.gpu, STAGES, measure=arguments.measure)
