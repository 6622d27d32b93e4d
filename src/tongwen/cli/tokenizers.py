"""The tokenizer command and its tasks."""

from __future__ import annotations

import argparse

from tongwen.cli import Add
from tongwen.core.i18n import say


def add_to(add: Add) -> None:
    """Add these commands."""
    command = add(
        "tokenizer", say("train, extend, merge and judge tokenizers", "训练、扩充、合并、评估分词器"), _tokenizer
    )
    _add_tokenizer(command)


def _add_tokenizer(command: argparse.ArgumentParser) -> None:
    kinds = command.add_subparsers(dest="task", required=True, metavar="TASK")

    def add(name: str, help_: str, out: bool = True) -> argparse.ArgumentParser:
        task = kinds.add_parser(name, help=help_, description=help_)
        task.add_argument(
            "--json", action="store_true", help=say("one JSON object on stdout", "在标准输出给出一个 JSON 对象")
        )
        task.add_argument("--out", required=out, default="", metavar="DIR", help=say("folder", "文件夹"))
        if out:
            task.add_argument(
                "--again", action="store_true", help=say("anew; the old folder is kept", "重新生成；保留旧文件夹")
            )
        return task

    def corpus(task: argparse.ArgumentParser) -> None:
        task.add_argument(
            "--corpus",
            required=True,
            nargs="+",
            metavar="F",
            help=say("text or data of any format", "任意格式的文本或数据"),
        )
        task.add_argument("--pieces", type=int, required=True, metavar="N", help=say("how many", "词数"))

    def script(task: argparse.ArgumentParser) -> None:
        task.add_argument(
            "--script",
            default="han",
            help=say("han, japanese, hangul, cyrillic, …", "han、japanese、hangul、cyrillic 等"),
        )

    task = add("train", say("a tokenizer from nothing", "从头训练分词器"))
    corpus(task)
    task.add_argument("--kind", default="byte-bpe", choices=("byte-bpe", "sp-bpe", "sp-unigram"))
    task.add_argument("--seed", type=int, default=42)
    task = add("extend", say("a base's tokenizer with pieces learned from a corpus", "用语料学到的词扩充底座的分词器"))
    task.add_argument("--base", required=True, metavar="MODEL", help=say("model or tokenizer file", "模型或分词器文件"))
    corpus(task)
    script(task)
    task.add_argument(
        "--word", action="append", default=[], help=say("a whole word as one piece", "整个词作为一个 token")
    )
    task.add_argument("--special", action="append", default=[], help=say("a special token", "特殊符号"))
    task = add(
        "merge", say("a SentencePiece model's pieces behind another's", "把一个 SentencePiece 模型的词加到另一个之后")
    )
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
    script(task)
    task = add(
        "report",
        say("what a tokenizer makes of texts, and whether to extend it", "分词器对文本的效果，以及是否值得扩充"),
        False,
    )
    task.add_argument("--base", required=True, metavar="A", help=say("model or tokenizer file", "模型或分词器文件"))
    task.add_argument("--other", default="", metavar="B", help=say("compare with this one", "与此对比"))
    task.add_argument("--text", required=True, nargs="+", metavar="F", help=say("text or data", "文本或数据"))
    script(task)


def _tokenizer(parsed: argparse.Namespace) -> int:
    from tongwen.commands import tokenizer

    if parsed.task == "train":
        return tokenizer.run_train(
            parsed.corpus, parsed.kind, parsed.pieces, parsed.out, parsed.seed, again=parsed.again
        )
    if parsed.task == "extend":
        return tokenizer.run_extend(
            parsed.base,
            parsed.corpus,
            parsed.pieces,
            parsed.out,
            script=parsed.script,
            words=parsed.word,
            special_tokens=parsed.special,
            again=parsed.again,
        )
    if parsed.task == "merge":
        return tokenizer.run_merge(
            parsed.base, parsed.add, parsed.mode, parsed.out, pad=parsed.pad, script=parsed.script, again=parsed.again
        )
    return tokenizer.run_report(parsed.base, parsed.other, parsed.text, parsed.out, parsed.script)
