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
    parser.add_argument("--signature", default="", metavar="FILE", help=_("a signature by `tongwen sign`; needs --key"))
    parser.add_argument("--key", default="", metavar="PUB", help=_("public key of the one who signed, in PEM"))


def run(arguments: argparse.Namespace) -> int:
    from tongwen.commands import sign, verify
    from tongwen.core.errors import RecipeError

    if bool(arguments.signature) != bool(arguments.key):
        raise RecipeError(_("`--signature` and `--key` are needed together"), place="tongwen verify")
    if arguments.signature and arguments.against:
        raise RecipeError(_("give only one of `--against` and `--signature`"), place="tongwen verify")
    if arguments.signature:
        return sign.check(arguments.path, arguments.signature, arguments.key)
    return verify.run(arguments.path, arguments.against)
