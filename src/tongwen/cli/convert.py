"""The `tongwen convert` command."""

from __future__ import annotations

import argparse

from tongwen.core.i18n import _


def summary() -> str:
    return _("convert a model to another format: Hugging Face, LLaMA .pth, GGUF")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SRC", help=_("model, or a folder of .pth files"))
    parser.add_argument("--to", required=True, choices=("hf", "pth", "gguf"), help=_("output format"))
    parser.add_argument("--out", required=True, metavar="D", help=_("folder"))
    parser.add_argument(
        "--quantize",
        default="",
        metavar="TYPE",
        help=_("GGUF dtype; f16 by default"),
    )
    parser.add_argument("--again", action="store_true", help=_("convert again; the old folder is kept"))
    parser.add_argument(
        "--push",
        default="",
        metavar="NAME",
        help=_("push it to a hub: OWNER/NAME or modelscope:OWNER/NAME"),
    )
    parser.add_argument("--public", action="store_true", help=_("make it public; private by default"))
    parser.set_defaults(writes=True)


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
