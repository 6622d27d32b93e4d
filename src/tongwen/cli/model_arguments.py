"""Arguments of the commands that open a model and generate with it."""

from __future__ import annotations

import argparse
from typing import Any

from tongwen.core.i18n import _
from tongwen.infer.presets import PRESETS

SAMPLING = ("max_new_tokens", "temperature", "top_p", "top_k", "repetition_penalty", "seed", "beams")


def add_adapters(parser: argparse.ArgumentParser) -> None:
    """Add `--adapter`, which may be repeated."""
    parser.add_argument("--adapter", action="append", default=[], help=_("adapter folder"))


def add_opening(parser: argparse.ArgumentParser, template: str = "own") -> None:
    """Add the options for opening a model; `template` is the default of `--template`."""
    parser.add_argument(
        "--template",
        default=template,
        help=_("own, a template's name, or `completion` for a base model"),
    )
    parser.add_argument("--thinking", default="off", choices=("on", "off"), help=_("let a thinking model think"))
    parser.add_argument(
        "--load",
        default="full",
        choices=("full", "8bit", "4bit", "auto"),
        help=_("weights: unquantised, in fewer bits, or the most bits that fit"),
    )


def add_sampling(parser: argparse.ArgumentParser) -> None:
    """Add the sampling options."""
    parser.add_argument(
        "--preset",
        choices=tuple(PRESETS),
        help=_("sample as this project did; the options below override it"),
    )
    parser.add_argument("--max-new-tokens", type=int, help="512")
    parser.add_argument("--temperature", type=float, help=_("0: always the likeliest"))
    parser.add_argument("--top-p", type=float, help="1")
    parser.add_argument("--top-k", type=int, help="0")
    parser.add_argument("--repetition-penalty", type=float, help="1")
    parser.add_argument("--seed", type=int)


def sampling(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return all sampling options: the defaults, overridden by the preset, overridden by the command line."""
    from dataclasses import asdict

    from tongwen.infer.generation import Sampling

    explicit = {name: value for name, value in vars(arguments).items() if name in SAMPLING and value is not None}
    return asdict(Sampling().override(**{**PRESETS.get(arguments.preset, {}), **explicit}))
