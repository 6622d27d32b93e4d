"""The `tongwen verify` command."""

from __future__ import annotations

import argparse

from tongwen.core.i18n import _


def summary() -> str:
    return _("compare weights, tokenizer, adapter with known or recorded hashes")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", metavar="PATH", help=_("file or folder"))
    parser.add_argument(
        "--against",
        default="",
        metavar="LIST",
        help=_("a file of hashes, or `known`: accept only published hashes"),
    )


def run(arguments: argparse.Namespace) -> int:
    from tongwen.commands import verify

    return verify.run(arguments.path, arguments.against)
