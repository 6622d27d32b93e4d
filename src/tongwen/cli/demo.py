"""The `tongwen demo` command."""

from __future__ import annotations

import argparse

from tongwen.core.i18n import _


def summary() -> str:
    return _("run the whole pipeline with a small real model on a laptop CPU")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", default="runs/demo", help=_("output folder"))
    parser.add_argument(
        "--model",
        default="",
        help=_("use the model in this folder instead of fetching SmolLM2-135M-Instruct"),
    )


def run(arguments: argparse.Namespace) -> int:
    from tongwen.commands import demo
    from tongwen.stages.base import STAGES

    return demo.run(arguments.out, arguments.model, STAGES)
