"""The `tongwen show` command."""

from __future__ import annotations

import argparse

from tongwen.core.i18n import say


def summary() -> str:
    return say(
        "what an artifact is and how it was made; or compare runs",
        "这个文件夹是什么、怎么来的；或对比几次训练",
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "path", nargs="+", metavar="PATH", help=say("folder; several are compared", "文件夹；多个则对比")
    )
    parser.add_argument(
        "--html", default="", metavar="FILE", help=say("draw the comparison into this page", "把对比画成此网页")
    )


def run(arguments: argparse.Namespace) -> int:
    if len(arguments.path) > 1 or arguments.html:
        from tongwen.commands import compare

        return compare.run(arguments.path, arguments.html)
    from tongwen.commands import show

    return show.run(arguments.path[0])
