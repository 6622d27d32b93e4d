"""The `tongwen clean` command."""

from __future__ import annotations

import argparse

from tongwen.core.i18n import _


def summary() -> str:
    return _("delete what finished runs no longer need; it asks first")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", nargs="*", default=["runs"], metavar="PATH", help=_("folder of runs; default runs"))
    parser.add_argument(
        "--cache", action="store_true", help=_("also list the cache of downloads and of the base's own answers")
    )
    parser.add_argument("--yes", action="store_true", help=_("delete without asking"))


def run(arguments: argparse.Namespace) -> int:
    from tongwen.commands import clean

    return clean.run(arguments.path, cache=arguments.cache, confirmed=arguments.yes)
