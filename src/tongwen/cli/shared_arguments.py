"""Arguments of commands that have nothing else in common."""

from __future__ import annotations

import argparse

from tongwen.core.i18n import say


def add_json(parser: argparse.ArgumentParser) -> None:
    """Every command takes `--json`."""
    parser.add_argument(
        "--json", action="store_true", help=say("one JSON object on stdout", "在标准输出给出一个 JSON 对象")
    )


def add_page_address(parser: argparse.ArgumentParser) -> None:
    """Where the browser finds the page of `web` and of `chat --web`."""
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        help=say(
            "web: an address other than loopback needs a token in TONGWEN_API_KEY",
            "网页：非本机地址需要 TONGWEN_API_KEY 中的令牌",
        ),
    )
    parser.add_argument(
        "--port", type=int, default=7860, help=say("web: port; 0: a free one", "网页：端口；0：任一空闲端口")
    )
