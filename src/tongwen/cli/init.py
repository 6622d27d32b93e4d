"""The `tongwen init` command."""

from __future__ import annotations

import argparse

from tongwen.core.i18n import _


def summary() -> str:
    return _("write a commented recipe to start from")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "template",
        nargs="?",
        default="",
        metavar="TEMPLATE",
        help=_("which template; without it, list all"),
    )
    parser.add_argument("--out", default="", metavar="FILE", help=_("write the recipe to this file"))


def run(arguments: argparse.Namespace) -> int:
    from tongwen.commands import init

    return init.run(arguments.template, arguments.out)
