"""The `tongwen chat` command."""

from __future__ import annotations

import argparse

from tongwen.cli import model_arguments, shared_arguments
from tongwen.core.errors import RecipeError
from tongwen.core.i18n import _


def summary() -> str:
    return _("talk to a model in the terminal")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model",
        metavar="MODEL",
        help=_("folder, hub id, modelscope:id, .gguf, or a stage folder"),
    )
    model_arguments.add_adapters(parser)
    parser.add_argument("--system", default="", help=_("system message"))
    parser.add_argument("--no-stream", action="store_true", help=_("show each answer only when it is complete"))
    parser.add_argument("--tools", default="", metavar="FILE", help=_("JSON list of tools that the model may call"))
    parser.add_argument("--web", action="store_true", help=_("in the browser"))
    parser.add_argument(
        "--beside",
        default="",
        metavar="MODEL",
        help=_("--web: another model that answers at the same time"),
    )
    shared_arguments.add_page_address(parser)
    model_arguments.add_opening(parser)
    model_arguments.add_sampling(parser)


def run(arguments: argparse.Namespace) -> int:
    sampling = model_arguments.sampling(arguments)
    if arguments.web:
        if arguments.tools:
            raise RecipeError(_("the page has no tools; chat in the terminal"), place="--tools", remedy="tongwen chat")
        from tongwen.commands import web

        return web.run(
            [],
            [arguments.model, *([arguments.beside] if arguments.beside else [])],
            adapters=arguments.adapter,
            system=arguments.system,
            sampling=sampling,
            all_tabs=False,
            template=arguments.template,
            thinking=arguments.thinking,
            weights=arguments.load,
            host=arguments.host,
            port=arguments.port,
        )
    from tongwen.commands import chat

    return chat.run(
        arguments.model,
        arguments.adapter,
        template=arguments.template,
        thinking=arguments.thinking,
        weights=arguments.load,
        sampling=sampling,
        system=arguments.system,
        stream=not arguments.no_stream,
        tools_file=arguments.tools,
    )
