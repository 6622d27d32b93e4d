"""The `tongwen convert` command."""

from __future__ import annotations

import argparse

from tongwen.core.i18n import say


def summary() -> str:
    return say(
        "a model in another form: Hugging Face, LLaMA's .pth, GGUF",
        "把模型转换为另一种格式：Hugging Face、LLaMA .pth、GGUF",
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SRC", help=say("model, or a folder of .pth files", "模型，或 .pth 文件夹"))
    parser.add_argument("--to", required=True, choices=("hf", "pth", "gguf"), help=say("form", "格式"))
    parser.add_argument("--out", required=True, metavar="D", help=say("folder", "文件夹"))
    parser.add_argument(
        "--quantize",
        default="",
        metavar="TYPE",
        help=say("GGUF number type; f16 when absent", "GGUF 数值类型；不写为 f16"),
    )
    parser.add_argument(
        "--again", action="store_true", help=say("convert again; the old folder is kept", "重新转换；保留旧文件夹")
    )
    parser.add_argument(
        "--push",
        default="",
        metavar="NAME",
        help=say(
            "send it to a hub: OWNER/NAME or modelscope:OWNER/NAME", "推送到 hub：OWNER/NAME 或 modelscope:OWNER/NAME"
        ),
    )
    parser.add_argument(
        "--public", action="store_true", help=say("visible to everybody; else private", "公开；否则为私有")
    )


def run(arguments: argparse.Namespace) -> int:
    from tongwen.commands import convert

    return convert.run(
        arguments.source,
        arguments.to,
        arguments.out,
        arguments.quantize,
        arguments.push,
        again=arguments.again,
        public=arguments.public,
    )
