"""The `tongwen show` command."""

from __future__ import annotations

import argparse

from tongwen.core.i18n import _


def summary() -> str:
    return _("show what an artifact is and how it was made, or compare runs")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", nargs="+", metavar="PATH", help=_("folder; give several to compare them"))
    parser.add_argument("--html", default="", metavar="FILE", help=_("write the comparison to this HTML page"))


def run(arguments: argparse.Namespace) -> int:
    if len(arguments.path) > 1 or arguments.html:
        from tongwen.commands import show_runs

        return show_runs.run(arguments.path, arguments.html)
    from tongwen.commands import show

    return show.run(arguments.path[0])
