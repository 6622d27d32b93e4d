"""The `tongwen doctor` command."""

from __future__ import annotations

import argparse

from tongwen.core.i18n import _


def summary() -> str:
    return _("show what this machine can do and reach, or explain an old failure")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("failure", nargs="?", default="", metavar="F-02", help=_("F-01 to F-48"))


def run(arguments: argparse.Namespace) -> int:
    from tongwen.commands import doctor

    return doctor.explain(arguments.failure) if arguments.failure else doctor.run()
