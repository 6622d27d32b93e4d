"""The `tongwen demo` command."""

from __future__ import annotations

import argparse

from tongwen.core.i18n import say


def summary() -> str:
    return say("the whole pipeline on a small real model, on a laptop CPU", "在笔记本 CPU 上用真实小模型走完整个流程")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", default="runs/demo", help=say("folder of the run", "输出文件夹"))
    parser.add_argument(
        "--model",
        default="",
        help=say(
            "folder of the model, instead of fetching SmolLM2-135M-Instruct",
            "模型文件夹，代替下载 SmolLM2-135M-Instruct",
        ),
    )


def run(arguments: argparse.Namespace) -> int:
    from tongwen.commands import demo
    from tongwen.stages.base import STAGES

    return demo.run(arguments.out, arguments.model, STAGES)
