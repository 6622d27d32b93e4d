"""The `tongwen evaluate` command."""

from __future__ import annotations

import argparse

from tongwen.cli import model_arguments
from tongwen.core.i18n import _


def summary() -> str:
    return _("score a model")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help=_("model"))
    model_arguments.add_adapters(parser)
    parser.add_argument(
        "--task",
        action="append",
        required=True,
        metavar="NAME",
        help=_("bits_per_byte, entity_f1, multiple_choice, …; repeatable; a wrong name lists all"),
    )
    parser.add_argument(
        "--data",
        metavar="F",
        help=_("file or folder: dialogues, documents, or CSV with options"),
    )
    parser.add_argument(
        "--suite",
        default="",
        metavar="NAME",
        help=_("lm_eval: task name, such as ceval-valid"),
    )
    parser.add_argument("--before", default="", metavar="MODEL", help=_("a model to compare with"))
    parser.add_argument(
        "--out",
        default="",
        metavar="DIR",
        help=_("folder for scores, rows and report"),
    )
    parser.add_argument("--limit", type=int, help=_("use only this many rows, from the first"))
    parser.add_argument(
        "--shots",
        type=int,
        default=0,
        help=_("examples before each multiple-choice question"),
    )
    parser.add_argument(
        "--examples",
        metavar="F",
        help=_("multiple_choice: where the examples are, such as dev/"),
    )
    parser.add_argument("--batch-size", type=int, default=32, help=_("maximum number of questions at a time"))
    parser.add_argument("--max-new-tokens", type=int, default=256)
    model_arguments.add_opening(parser, template="auto")
    parser.set_defaults(writes=True)


def run(arguments: argparse.Namespace) -> int:
    from tongwen.commands import evaluate
    from tongwen.recipe.load import from_options

    task = {name: getattr(arguments, name) for name in ("data", "suite", "examples", "shots", "limit")}
    section = {name: getattr(arguments, name) for name in ("batch_size", "max_new_tokens")}
    section["tasks"] = [{"task": name, **task} for name in arguments.task]
    recipe = from_options({"name": "evaluate", "base": arguments.model, "evaluate": section}, "tongwen evaluate")
    return evaluate.run(
        recipe,
        arguments.adapter,
        before=arguments.before,
        template=arguments.template,
        thinking=arguments.thinking,
        weights=arguments.load,
        out=arguments.out,
    )
