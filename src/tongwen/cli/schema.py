"""The `tongwen schema` command."""

from __future__ import annotations

import argparse

from tongwen.core.i18n import say


def summary() -> str:
    return say("every key of a recipe", "配方的每一个键")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("section", nargs="?", default="", metavar="SECTION", help=say("one section", "某一段"))


def run(arguments: argparse.Namespace) -> int:
    from tongwen.recipe import docs

    return docs.run(arguments.section)
