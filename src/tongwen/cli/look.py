"""The `tongwen look` command."""

from __future__ import annotations

import argparse

from tongwen.cli import recipe_arguments
from tongwen.core.i18n import say


def summary() -> str:
    return say("encoded samples, learned tokens coloured", "查看编码后的样本，学习的 token 有颜色")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    recipe_arguments.add_recipe(parser)
    parser.add_argument("-n", type=int, default=3, help=say("how many", "几个"))
    parser.add_argument("--html", default="", metavar="FILE", help=say("write a page instead", "写成网页"))


def run(arguments: argparse.Namespace) -> int:
    from tongwen.commands import look

    return look.run(recipe_arguments.load(arguments), arguments.n, arguments.html)
