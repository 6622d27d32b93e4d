"""The `tongwen generate` command."""

from __future__ import annotations

import argparse

from tongwen.cli import model_arguments
from tongwen.core.i18n import say


def summary() -> str:
    return say("answer a file of prompts", "回答一个文件里的提示")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help=say("model", "模型"))
    model_arguments.add_adapters(parser)
    parser.add_argument(
        "--prompts",
        required=True,
        metavar="F",
        help=say(
            "text (one a line), JSON with `prompt` or `messages`, or a data set with answers",
            "文本（每行一个）、含 `prompt`/`messages` 的 JSON，或带答案的数据集",
        ),
    )
    parser.add_argument("--out", required=True, metavar="F", help=say("the answers", "回答"))
    parser.add_argument(
        "--form",
        default="jsonl",
        choices=("jsonl", "belle", "chinese-llama-alpaca"),
        help=say("rows, or the array that the project's script wrote", "逐行 JSON，或该项目脚本所写的数组"),
    )
    parser.add_argument(
        "--engine",
        default="auto",
        choices=("auto", "batched", "paged", "llama.cpp", "vllm"),
        help=say(
            "auto: llama.cpp for a .gguf file, else batched; paged: continuous batching",
            "auto：.gguf 用 llama.cpp，其余用 batched；paged：连续批处理",
        ),
    )
    parser.add_argument(
        "--endpoint",
        default="",
        metavar="URL",
        help=say(
            "an OpenAI-compatible address, which knows --model; key: OPENAI_API_KEY",
            "OpenAI 兼容接口的地址，--model 为其中的名字；密钥：OPENAI_API_KEY",
        ),
    )
    parser.add_argument("--beams", type=int, help=say("beam search", "束搜索"))
    parser.add_argument("--batch-size", type=int, default=32, help=say("prompts side by side, at most", "同时处理几个"))
    parser.add_argument(
        "--again", action="store_true", help=say("start over; the old file is kept", "重新开始；旧文件保留")
    )
    model_arguments.add_opening(parser)
    model_arguments.add_sampling(parser)


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
