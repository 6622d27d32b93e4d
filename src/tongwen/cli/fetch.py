"""The `tongwen fetch` command."""

from __future__ import annotations

import argparse
import os

from tongwen.core.i18n import say


def summary() -> str:
    return say("public data sets, models and adapters by name, verified", "按名称获取公开数据集、模型与适配器并校验")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "name",
        nargs="?",
        default="",
        metavar="NAME",
        help=say(
            "a short name, OWNER/NAME or modelscope:OWNER/NAME; none: the list",
            "简称、OWNER/NAME 或 modelscope:OWNER/NAME；不写则列出",
        ),
    )
    parser.add_argument(
        "--out",
        default="",
        metavar="DIR",
        help=say("folder; data/NAME or models/NAME", "文件夹；默认 data/NAME 或 models/NAME"),
    )
    parser.add_argument(
        "--dev",
        type=float,
        nargs="?",
        const=0.01,
        default=0.0,
        metavar="SHARE",
        help=say("split off this share of the rows", "划出这一比例的行"),
    )
    parser.add_argument("--seed", type=int, default=42, help=say("of the split", "划分的种子"))
    parser.add_argument(
        "--old-names", action="store_true", help=say("name the parts as BELLE did", "按 BELLE 的旧文件名命名")
    )
    parser.add_argument("--revision", default="", help=say("branch, tag or commit", "分支、标签或提交"))
    parser.add_argument(
        "--kind", default="", choices=("model", "dataset"), help=say("when the hub has both", "hub 上两者同名时")
    )
    parser.add_argument(
        "--files",
        action="append",
        default=[],
        metavar="PATTERN",
        help=say("these files only; !PATTERN leaves out", "只取这些文件；!模式 表示排除"),
    )
    parser.add_argument(
        "--local-files-only",
        action="store_true",
        help=say("use files on this machine, else fail; ask no hub", "不访问模型站：只用本机已有的，否则报错"),
    )
    parser.add_argument(
        "--code", action="store_true", help=say("fetch *.py too (never run here)", "也获取 *.py（本工具从不运行）")
    )
    parser.add_argument(
        "--again", action="store_true", help=say("fetch again; the old folder is kept", "重新获取；保留旧文件夹")
    )


def run(arguments: argparse.Namespace) -> int:
    if arguments.local_files_only:
        os.environ["HF_HUB_OFFLINE"] = "1"  # huggingface_hub reads it when it is imported, below
    from tongwen.commands import fetch

    return fetch.run(
        arguments.name,
        arguments.out,
        dev=arguments.dev,
        seed=arguments.seed,
        old_names=arguments.old_names,
        revision=arguments.revision,
        kind=arguments.kind,
        files=arguments.files,
        code=arguments.code,
        again=arguments.again,
    )
