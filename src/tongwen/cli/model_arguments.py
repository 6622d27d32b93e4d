"""Arguments of the commands that open a model and generate with it."""

from __future__ import annotations

import argparse
from typing import Any

from tongwen.core.i18n import say
from tongwen.infer.presets import PRESETS

SAMPLING = ("max_new_tokens", "temperature", "top_p", "top_k", "repetition_penalty", "seed", "beams")


def add_adapters(parser: argparse.ArgumentParser) -> None:
    """Adapters upon the model."""
    parser.add_argument("--adapter", action="append", default=[], help=say("adapter folder", "适配器文件夹"))


def add_opening(parser: argparse.ArgumentParser, template: str = "own") -> None:
    """How a model is opened; `template` is the default of `--template`."""
    parser.add_argument(
        "--template",
        default=template,
        help=say(
            "own, a template's name, or `completion` for a base model", "own、模板名，或 `completion`（基座模型续写）"
        ),
    )
    parser.add_argument(
        "--thinking", default="off", choices=("on", "off"), help=say("let a thinking model think", "让思考模型思考")
    )
    parser.add_argument(
        "--load",
        default="full",
        choices=("full", "8bit", "4bit", "auto"),
        help=say("weights: whole, in fewer bits, or what fits", "权重：完整、更少的位数，或放得下的"),
    )


def add_sampling(parser: argparse.ArgumentParser) -> None:
    """How the next token is chosen."""
    parser.add_argument(
        "--preset",
        choices=tuple(PRESETS),
        help=say("sample as this project did; the options below win", "按该项目的方式采样；以下选项优先"),
    )
    parser.add_argument("--max-new-tokens", type=int, help="512")
    parser.add_argument("--temperature", type=float, help=say("0: always the likeliest", "0：总取最可能的"))
    parser.add_argument("--top-p", type=float, help="1")
    parser.add_argument("--top-k", type=int, help="0")
    parser.add_argument("--repetition-penalty", type=float, help="1")
    parser.add_argument("--seed", type=int)


def sampling(arguments: argparse.Namespace) -> dict[str, Any]:
    """All sampling options: the defaults, over them the preset, over it what the command line sets."""
    from dataclasses import asdict

    from tongwen.infer.generation import Sampling

    given = {name: value for name, value in vars(arguments).items() if name in SAMPLING and value is not None}
    return asdict(Sampling().with_(**{**PRESETS.get(arguments.preset, {}), **given}))
