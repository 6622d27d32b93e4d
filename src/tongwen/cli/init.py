"""The `tongwen init` command."""

from __future__ import annotations

import argparse

from tongwen.core.i18n import say


def summary() -> str:
    return say("a commented recipe to start from", "生成一份带注释的配方")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "template",
        nargs="?",
        default="",
        metavar="TEMPLATE",
        help=say("which one; without it they are listed", "哪一份；不写则列出"),
    )
    parser.add_argument("--out", default="", metavar="FILE", help=say("write it here", "写到此文件"))


def run(arguments: argparse.Namespace) -> int:
    from tongwen.commands import init

    return init.run(arguments.template, arguments.out)
