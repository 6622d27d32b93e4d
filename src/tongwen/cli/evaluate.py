"""The `tongwen evaluate` command."""

from __future__ import annotations

import argparse

from tongwen.cli import model_arguments
from tongwen.core.i18n import say


def summary() -> str:
    return say("score a model", "给模型评分")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help=say("model", "模型"))
    model_arguments.add_adapters(parser)
    parser.add_argument(
        "--task",
        action="append",
        required=True,
        metavar="NAME",
        help=say(
            "bits_per_byte, entity_f1, multiple_choice, …; may stand several times, a wrong name lists all",
            "bits_per_byte、entity_f1、multiple_choice……可写多次，写错会列出全部",
        ),
    )
    parser.add_argument(
        "--data",
        metavar="F",
        help=say("file or folder: dialogues, documents, or CSV with options", "文件或文件夹：对话、文档或带选项的 CSV"),
    )
    parser.add_argument(
        "--suite",
        default="",
        metavar="NAME",
        help=say("task lm_eval: a task of that harness", "任务 lm_eval：其中的任务名"),
    )
    parser.add_argument("--before", default="", metavar="MODEL", help=say("a model to compare with", "用来对比的模型"))
    parser.add_argument(
        "--out",
        default="",
        metavar="DIR",
        help=say("folder for scores, rows and report", "分数、逐行结果与报告的文件夹"),
    )
    parser.add_argument("--limit", type=int, help=say("only the first rows", "只取前几行"))
    parser.add_argument(
        "--shots",
        type=int,
        default=0,
        help=say("examples before a question with options", "选择题的题前示例数"),
    )
    parser.add_argument(
        "--examples",
        metavar="F",
        help=say("multiple_choice: where they are, such as dev/", "multiple_choice：示例所在，如 dev/"),
    )
    parser.add_argument(
        "--batch-size", type=int, default=32, help=say("questions side by side, at most", "同时处理几个")
    )
    parser.add_argument("--max-new-tokens", type=int, default=256)
    model_arguments.add_opening(parser, template="auto")


def run(arguments: argparse.Namespace) -> int:
    from tongwen.recipe.load import from_options
    from tongwen.stages import evaluate

    task = {name: getattr(arguments, name) for name in ("data", "suite", "examples", "shots", "limit")}
    section = {name: getattr(arguments, name) for name in ("batch_size", "max_new_tokens")}
    section["tasks"] = [{"task": name, **task} for name in arguments.task]
    recipe = from_options({"name": "evaluate", "base": arguments.model, "evaluate": section}, "tongwen evaluate")
    return evaluate.command(
        recipe,
        arguments.adapter,
        before=arguments.before,
        template=arguments.template,
        thinking=arguments.thinking,
        weights=arguments.load,
        out=arguments.out,
    )
