"""The `tongwen web` command."""

from __future__ import annotations

import argparse

from tongwen.cli import model_arguments, shared_arguments
from tongwen.core.i18n import say


def summary() -> str:
    return say("the whole workbench in the browser", "浏览器里的整个工作台")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "folders", nargs="*", default=["."], metavar="FOLDER", help=say("what the page may see", "网页可以访问的文件夹")
    )
    parser.add_argument(
        "--model",
        action="append",
        default=[],
        help=say("model of the chat; twice: side by side", "对话使用的模型；写两次则并排"),
    )
    shared_arguments.add_page_address(parser)
    model_arguments.add_opening(parser)


def run(arguments: argparse.Namespace) -> int:
    from tongwen.commands import web

    return web.run(
        arguments.folders,
        arguments.model,
        whole=True,
        template=arguments.template,
        thinking=arguments.thinking,
        weights=arguments.load,
        host=arguments.host,
        port=arguments.port,
    )
