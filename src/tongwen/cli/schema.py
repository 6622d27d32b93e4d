"""The `tongwen schema` command."""

from __future__ import annotations

import argparse

from tongwen.core.i18n import _


def summary() -> str:
    return _("list every key of a recipe")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("section", nargs="?", default="", metavar="SECTION", help=_("list only this section"))


def run(arguments: argparse.Namespace) -> int:
    from tongwen.recipe import docs

    return docs.run(arguments.section)
