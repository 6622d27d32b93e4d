"""The `tongwen tokenizer` command, with a task for each job."""

from __future__ import annotations

import argparse

from tongwen.cli.shared_arguments import SEED, add_json, whole_number
from tongwen.core.i18n import _


def summary() -> str:
    return _("train, extend, merge and evaluate tokenizers")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    tasks = parser.add_subparsers(dest="task", required=True, metavar="TASK")

    def add(name: str, summary: str) -> argparse.ArgumentParser:
        task: argparse.ArgumentParser = tasks.add_parser(name, help=summary, description=summary)
        task.set_defaults(parser=task)
        add_json(task)
        return task

    _add_train(add("train", _("train a tokenizer from scratch")))
    _add_extend(add("extend", _("extend a base's tokenizer with pieces learned from a corpus")))
    _add_merge(
        add(
            "merge",
            _("append one SentencePiece model's pieces to another's"),
        )
    )
    _add_report(
        add(
            "report",
            _("report how well a tokenizer encodes texts and whether to extend it"),
        )
    )
    parser.set_defaults(writes=True)


def run(arguments: argparse.Namespace) -> int:
    task = {"train": _train, "extend": _extend, "merge": _merge, "report": _report}[arguments.task]
    return task(arguments)


def _add_train(task: argparse.ArgumentParser) -> None:
    _add_out(task)
    _add_corpus(task)
    task.add_argument("--kind", default="byte-bpe", choices=("byte-bpe", "sp-bpe", "sp-unigram"))
    task.add_argument("--seed", type=whole_number(0, SEED), default=42)


def _train(arguments: argparse.Namespace) -> int:
    from tongwen.commands import tokenizer

    return tokenizer.run_train(
        arguments.corpus, arguments.kind, arguments.pieces, arguments.out, arguments.seed, again=arguments.again
    )


def _add_extend(task: argparse.ArgumentParser) -> None:
    _add_out(task)
    task.add_argument("--base", required=True, metavar="MODEL", help=_("model or tokenizer file"))
    _add_corpus(task)
    _add_script(task)
    task.add_argument("--word", action="append", default=[], help=_("add this whole word as one piece"))
    task.add_argument("--special", action="append", default=[], help=_("add this special token"))


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
        help=_("legacy: as Chinese-LLaMA-Alpaca; keep-scores: as BELLE"),
    )
    task.add_argument("--pad", action="store_true", help=_("also add [PAD] at the end"))
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
    task.add_argument("--out", default="", metavar="DIR", help=_("folder"))
    task.add_argument("--base", required=True, metavar="A", help=_("model or tokenizer file"))
    task.add_argument("--other", default="", metavar="B", help=_("compare with this one"))
    task.add_argument("--text", required=True, nargs="+", metavar="F", help=_("text or data"))
    _add_script(task)


def _report(arguments: argparse.Namespace) -> int:
    from tongwen.commands import tokenizer

    return tokenizer.run_report(arguments.base, arguments.other, arguments.text, arguments.out, arguments.script)


def _add_out(task: argparse.ArgumentParser) -> None:
    task.add_argument("--out", required=True, metavar="DIR", help=_("folder"))
    task.add_argument("--again", action="store_true", help=_("start over; the old folder is kept"))


def _add_corpus(task: argparse.ArgumentParser) -> None:
    task.add_argument(
        "--corpus",
        required=True,
        nargs="+",
        metavar="F",
        help=_("text or data of any format"),
    )
    task.add_argument(
        "--pieces", type=whole_number(0, 10_000_000), required=True, metavar="N", help=_("number of new pieces")
    )


def _add_script(task: argparse.ArgumentParser) -> None:
    task.add_argument("--script", default="han", help=_("han, japanese, hangul, cyrillic, …"))
