"""The `tongwen tokenizer` command, with a task for each job."""

from __future__ import annotations

import argparse

from tongwen.cli.shared_arguments import add_json
from tongwen.core.i18n import say


def summary() -> str:
    return say("train, extend, merge and judge tokenizers", "训练、扩充、合并、评估分词器")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    tasks = parser.add_subparsers(dest="task", required=True, metavar="TASK")

    def add(name: str, summary: str) -> argparse.ArgumentParser:
        task: argparse.ArgumentParser = tasks.add_parser(name, help=summary, description=summary)
        task.set_defaults(parser=task)
        add_json(task)
        return task

    _add_train(add("train", say("a tokenizer from nothing", "从头训练分词器")))
    _add_extend(
        add("extend", say("a base's tokenizer with pieces learned from a corpus", "用语料学到的词扩充底座的分词器"))
    )
    _add_merge(
        add(
            "merge",
            say("a SentencePiece model's pieces behind another's", "把一个 SentencePiece 模型的词加到另一个之后"),
        )
    )
    _add_report(
        add(
            "report",
            say("how well a tokenizer encodes texts, and whether to extend it", "分词器对文本的效果，以及是否值得扩充"),
        )
    )


def run(arguments: argparse.Namespace) -> int:
    task = {"train": _train, "extend": _extend, "merge": _merge, "report": _report}[arguments.task]
    return task(arguments)


def _add_train(task: argparse.ArgumentParser) -> None:
    _add_out(task)
    _add_corpus(task)
    task.add_argument("--kind", default="byte-bpe", choices=("byte-bpe", "sp-bpe", "sp-unigram"))
    task.add_argument("--seed", type=int, default=42)


def _train(arguments: argparse.Namespace) -> int:
    from tongwen.commands import tokenizer

    return tokenizer.run_train(
        arguments.corpus, arguments.kind, arguments.pieces, arguments.out, arguments.seed, again=arguments.again
    )


def _add_extend(task: argparse.ArgumentParser) -> None:
    _add_out(task)
    task.add_argument("--base", required=True, metavar="MODEL", help=say("model or tokenizer file", "模型或分词器文件"))
    _add_corpus(task)
    _add_script(task)
    task.add_argument(
        "--word", action="append", default=[], help=say("a whole word as one piece", "整个词作为一个 token")
    )
    task.add_argument("--special", action="append", default=[], help=say("a special token", "特殊符号"))


def _extend(arguments: argparse.Namespace) -> int:
    from tongwen.commands import tokenizer

    return tokenizer.run_extend(
        arguments.base,
        arguments.corpus,
        arguments.pieces,
        arguments.out,
        script=arguments.script,
        words=arguments.word,
        special_tokens=arguments.special,
        again=arguments.again,
    )


def _add_merge(task: argparse.ArgumentParser) -> None:
    _add_out(task)
    task.add_argument("--base", required=True, metavar="F.model")
    task.add_argument("--add", required=True, metavar="F.model")
    task.add_argument(
        "--mode",
        default="default",
        choices=("default", "legacy", "keep-scores"),
        help=say(
            "legacy: as Chinese-LLaMA-Alpaca; keep-scores: as BELLE",
            "legacy：同 Chinese-LLaMA-Alpaca；keep-scores：同 BELLE",
        ),
    )
    task.add_argument("--pad", action="store_true", help=say("and [PAD] behind them", "最后再加 [PAD]"))
    _add_script(task)


def _merge(arguments: argparse.Namespace) -> int:
    from tongwen.commands import tokenizer

    return tokenizer.run_merge(
        arguments.base,
        arguments.add,
        arguments.mode,
        arguments.out,
        pad=arguments.pad,
        script=arguments.script,
        again=arguments.again,
    )


def _add_report(task: argparse.ArgumentParser) -> None:
    task.add_argument("--out", default="", metavar="DIR", help=say("folder", "文件夹"))
    task.add_argument("--base", required=True, metavar="A", help=say("model or tokenizer file", "模型或分词器文件"))
    task.add_argument("--other", default="", metavar="B", help=say("compare with this one", "与此对比"))
    task.add_argument("--text", required=True, nargs="+", metavar="F", help=say("text or data", "文本或数据"))
    _add_script(task)


def _report(arguments: argparse.Namespace) -> int:
    from tongwen.commands import tokenizer

    return tokenizer.run_report(arguments.base, arguments.other, arguments.text, arguments.out, arguments.script)


def _add_out(task: argparse.ArgumentParser) -> None:
    task.add_argument("--out", required=True, metavar="DIR", help=say("folder", "文件夹"))
    task.add_argument(
        "--again", action="store_true", help=say("start over; the old folder is kept", "重新生成；保留旧文件夹")
    )


def _add_corpus(task: argparse.ArgumentParser) -> None:
    task.add_argument(
        "--corpus",
        required=True,
        nargs="+",
        metavar="F",
        help=say("text or data of any format", "任意格式的文本或数据"),
    )
    task.add_argument("--pieces", type=int, required=True, metavar="N", help=say("how many", "词数"))


def _add_script(task: argparse.ArgumentParser) -> None:
    task.add_argument(
        "--script", default="han", help=say("han, japanese, hangul, cyrillic, …", "han、japanese、hangul、cyrillic 等")
    )
