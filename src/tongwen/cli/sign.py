"""The `tongwen sign` command."""

from __future__ import annotations

import argparse

from tongwen.core.i18n import _


def summary() -> str:
    return _("sign a model's files with a private key of yours")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", metavar="PATH", help=_("file or folder"))
    parser.add_argument("--key", required=True, metavar="FILE", help=_("private key: an elliptic curve in PEM"))
    parser.add_argument(
        "--out", default="", metavar="FILE", help=_("write the signature to this file; default PATH.sig")
    )


def run(arguments: argparse.Namespace) -> int:
    from tongwen.commands import sign

    return sign.run(arguments.path, arguments.key, arguments.out)
