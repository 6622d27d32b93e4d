"""The `tongwen verify` command."""

from __future__ import annotations

import argparse

from tongwen.core.i18n import say


def summary() -> str:
    return say(
        "compare weights, tokenizer, adapter with known or recorded hashes",
        "用已知或记录的哈希核对权重、分词器与适配器",
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", metavar="PATH", help=say("file or folder", "文件或文件夹"))
    parser.add_argument(
        "--against",
        default="",
        metavar="LIST",
        help=say(
            "a file of hashes, or `known`: only published hashes pass", "哈希清单文件，或 `known`：只接受已发布的"
        ),
    )


def run(arguments: argparse.Namespace) -> int:
    from tongwen.commands import verify

    return verify.run(arguments.path, arguments.against)
