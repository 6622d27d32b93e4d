"""The `tongwen serve` command."""

from __future__ import annotations

import argparse

from tongwen.cli import model_arguments
from tongwen.core.i18n import say


def summary() -> str:
    return say("OpenAI's API for a model, on this machine", "在本机以 OpenAI 接口提供模型")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help=say("as for chat", "同 chat"))
    model_arguments.add_adapters(parser)
    parser.add_argument(
        "--name", default="", help=say("the model's name; absent: its folder's", "模型名；不写用文件夹名")
    )
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        help=say(
            "an address other than loopback needs a token in TONGWEN_API_KEY", "非本机地址需要 TONGWEN_API_KEY 中的令牌"
        ),
    )
    parser.add_argument("--port", type=int, default=8000, help=say("0: a free one", "0：任一空闲端口"))
    parser.add_argument(
        "--queue",
        type=int,
        default=16,
        help=say("requests that may wait; further ones get a 429", "最多排队的请求数；再多则返回 429"),
    )
    model_arguments.add_opening(parser)
    model_arguments.add_sampling(parser)


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
