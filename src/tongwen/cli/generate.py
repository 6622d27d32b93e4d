"""The `tongwen generate` command."""

from __future__ import annotations

import argparse

from tongwen.cli import model_arguments
from tongwen.cli.shared_arguments import whole_number
from tongwen.core.i18n import _


def summary() -> str:
    return _("answer the prompts in a file")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help=_("model"))
    model_arguments.add_adapters(parser)
    parser.add_argument(
        "--prompts",
        required=True,
        metavar="F",
        help=_("text (one prompt per line), JSON with `prompt` or `messages`, or a data set with answers"),
    )
    parser.add_argument("--out", required=True, metavar="F", help=_("file for the answers"))
    parser.add_argument(
        "--form",
        default="jsonl",
        choices=("jsonl", "belle", "chinese-llama-alpaca"),
        help=_("JSON lines, or the array that the project's script wrote"),
    )
    parser.add_argument(
        "--engine",
        default="auto",
        choices=("auto", "batched", "paged", "llama.cpp", "vllm"),
        help=_("auto: llama.cpp for a .gguf file, else batched; paged: continuous batching"),
    )
    parser.add_argument(
        "--endpoint",
        default="",
        metavar="URL",
        help=_("address of an OpenAI-compatible API, with --model as a name there; key: OPENAI_API_KEY"),
    )
    parser.add_argument("--beams", type=int, help=_("beam search"))
    parser.add_argument("--batch-size", type=whole_number(1), default=32, help=_("maximum number of prompts at a time"))
    parser.add_argument("--again", action="store_true", help=_("start over; the old file is kept"))
    model_arguments.add_opening(parser)
    model_arguments.add_sampling(parser)
    parser.set_defaults(writes=True)


def run(arguments: argparse.Namespace) -> int:
    from tongwen.commands import generate

    return generate.run(
        generate.AnswerSource(
            arguments.model,
            arguments.adapter,
            arguments.template,
            arguments.thinking,
            arguments.load,
            arguments.engine,
            arguments.endpoint,
        ),
        arguments.prompts,
        arguments.out,
        form=arguments.form,
        batch_size=arguments.batch_size,
        sampling=model_arguments.sampling(arguments),
        again=arguments.again,
    )
