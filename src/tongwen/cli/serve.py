"""The `tongwen serve` command."""

from __future__ import annotations

import argparse

from tongwen.cli import model_arguments
from tongwen.cli.shared_arguments import whole_number
from tongwen.core.i18n import _


def summary() -> str:
    return _("serve a model through OpenAI's API on this machine")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help=_("folder, hub id, modelscope:id, .gguf, or a stage folder"))
    model_arguments.add_adapters(parser)
    parser.add_argument("--name", default="", help=_("the model's name; its folder's by default"))
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        help=_("an address other than loopback needs a token in TONGWEN_API_KEY"),
    )
    parser.add_argument("--port", type=whole_number(0, 65535), default=8000, help=_("0: any free port"))
    parser.add_argument(
        "--queue",
        type=whole_number(0),
        default=16,
        help=_("maximum number of waiting requests; further ones get a 429"),
    )
    model_arguments.add_opening(parser)
    model_arguments.add_sampling(parser)
    parser.set_defaults(serves=True)  # SIGTERM is its usual end


def run(arguments: argparse.Namespace) -> int:
    from tongwen.commands import serve

    return serve.run(
        arguments.model,
        arguments.adapter,
        name=arguments.name,
        host=arguments.host,
        port=arguments.port,
        queue=arguments.queue,
        template=arguments.template,
        thinking=arguments.thinking,
        weights=arguments.load,
        sampling=model_arguments.sampling(arguments),
    )
