"""The `tongwen look` command."""

from __future__ import annotations

import argparse

from tongwen.cli import recipe_arguments
from tongwen.cli.shared_arguments import whole_number
from tongwen.core.i18n import _


def summary() -> str:
    return _("show encoded samples, with the learned tokens coloured")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    recipe_arguments.add_recipe(parser)
    parser.add_argument("-n", type=whole_number(1), default=3, help=_("number of samples"))
    parser.add_argument("--html", default="", metavar="FILE", help=_("write an HTML page instead"))


def run(arguments: argparse.Namespace) -> int:
    from tongwen.commands import look

    return look.run(recipe_arguments.load(arguments), arguments.n, arguments.html)
