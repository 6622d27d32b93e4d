"""The `tongwen init` command."""

from __future__ import annotations

import argparse

from tongwen.core.i18n import _


def summary() -> str:
    return _("write a commented recipe to start from")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "template",
        nargs="?",
        default="",
        metavar="TEMPLATE",
        help=_("which template, bot or from-documents; without it, list all"),
    )
    parser.add_argument("documents", nargs="?", default="", metavar="DIR", help=_("from-documents: files or folder"))
    parser.add_argument("--out", default="", metavar="FILE", help=_("write the recipe to this file"))
    parser.add_argument(
        "--base", default="", metavar="MODEL", help=_("bot, from-documents: base model; default Qwen/Qwen3-0.6B")
    )
    parser.add_argument("--name", default="", help=_("bot: its name"))
    parser.add_argument("--author", default="", help=_("bot: who trains it"))
    parser.add_argument("--endpoint", default="", metavar="URL", help=_("from-documents: base URL of the endpoint"))
    parser.add_argument("--model", default="", help=_("from-documents: model name at the endpoint"))


def run(arguments: argparse.Namespace) -> int:
    from tongwen.commands import init, init_project

    if arguments.template == "bot":
        return init_project.write_bot(arguments.out, arguments.name, arguments.author, arguments.base)
    if arguments.template == "from-documents":
        return init_project.write_from_documents(
            arguments.out, arguments.documents, arguments.base, arguments.endpoint, arguments.model
        )
    return init.run(arguments.template, arguments.out)
