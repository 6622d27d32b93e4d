"""The `tongwen web` command."""

from __future__ import annotations

import argparse

from tongwen.cli import model_arguments, shared_arguments
from tongwen.core.i18n import _


def summary() -> str:
    return _("open the whole workbench in the browser")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "folders", nargs="*", default=["."], metavar="FOLDER", help=_("folder that the page may access")
    )
    parser.add_argument(
        "--model",
        action="append",
        default=[],
        help=_("model of the chat; give two to see them side by side"),
    )
    shared_arguments.add_page_address(parser)
    model_arguments.add_opening(parser)
    parser.set_defaults(serves=True)  # SIGTERM is its usual end


def run(arguments: argparse.Namespace) -> int:
    from tongwen.commands import web

    return web.run(
        arguments.folders,
        arguments.model,
        all_tabs=True,
        template=arguments.template,
        thinking=arguments.thinking,
        weights=arguments.load,
        host=arguments.host,
        port=arguments.port,
    )
