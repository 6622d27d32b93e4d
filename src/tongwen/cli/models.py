"""What is done with models, adapters and data sets: fetch, merge, convert, verify, show; and what the machine can do."""

from __future__ import annotations

import argparse
import os

from tongwen.cli import Add
from tongwen.core.i18n import say


def add_to(add: Add) -> None:
    """Add these commands."""
    command = add(
        "fetch",
        say("public data sets, models and adapters by name, verified", "按名称获取公开数据集、模型与适配器并校验"),
        _fetch,
    )
    command.add_argument(
        "name",
        nargs="?",
        default="",
        metavar="NAME",
        help=say(
            "a short name, OWNER/NAME or modelscope:OWNER/NAME; none: the list",
            "简称、OWNER/NAME 或 modelscope:OWNER/NAME；不写则列出",
        ),
    )
    command.add_argument(
        "--out",
        default="",
        metavar="DIR",
        help=say("folder; data/NAME or models/NAME", "文件夹；默认 data/NAME 或 models/NAME"),
    )
    command.add_argument(
        "--dev",
        type=float,
        nargs="?",
        const=0.01,
        default=0.0,
        metavar="SHARE",
        help=say("split off this share of the rows", "划出这一比例的行"),
    )
    command.add_argument("--seed", type=int, default=42, help=say("of the split", "划分的种子"))
    command.add_argument(
        "--old-names", action="store_true", help=say("name the parts as BELLE did", "按 BELLE 的旧文件名命名")
    )
    command.add_argument("--revision", default="", help=say("branch, tag or commit", "分支、标签或提交"))
    command.add_argument(
        "--kind", default="", choices=("model", "dataset"), help=say("when the hub has both", "hub 上两者同名时")
    )
    command.add_argument(
        "--files",
        action="append",
        default=[],
        metavar="PATTERN",
        help=say("these files only; !PATTERN leaves out", "只取这些文件；!模式 表示排除"),
    )
    command.add_argument(
        "--local-files-only",
        action="store_true",
        help=say("ask no hub: what is here, or an error", "不访问模型站：只用本机已有的，否则报错"),
    )
    command.add_argument(
        "--code", action="store_true", help=say("fetch *.py too (never run here)", "也获取 *.py（本工具从不运行）")
    )
    command.add_argument(
        "--again", action="store_true", help=say("anew; the old folder is kept", "重新获取；保留旧文件夹")
    )
    command = add("merge", say("fold adapters into their base", "把适配器并入底座"), _merge)
    command.add_argument("--base", required=True, help=say("model", "模型"))
    command.add_argument(
        "--adapter",
        default=[],
        action="append",
        help=say("adapter folder; several in the order in which they were trained", "适配器文件夹；多个则按训练的先后"),
    )
    command.add_argument(
        "--chat-vector",
        nargs=2,
        metavar=("INSTRUCT", "BASE"),
        help=say(
            "instead: add what INSTRUCT has over BASE to a model that descends from BASE",
            "或：把 INSTRUCT 相对 BASE 的差值加到同源的模型上",
        ),
    )
    command.add_argument(
        "--combine",
        default="",
        choices=("linear", "ties"),
        help=say(
            "instead of one upon the other: adapters trained beside each other on one base, summed or by TIES",
            "不是依次叠加，而是组合在同一底座上分别训练的适配器：求和，或 TIES",
        ),
    )
    command.add_argument(
        "--weight",
        type=float,
        action="append",
        default=[],
        metavar="W",
        help=say("of each adapter that is combined; equal shares when absent", "被组合的各适配器的权重；不写则均等"),
    )
    command.add_argument(
        "--density",
        type=float,
        default=0.2,
        help=say("share of each adapter's changes that TIES keeps", "TIES 保留的改变的比例"),
    )
    command.add_argument(
        "--scale",
        type=float,
        default=1.0,
        help=say("of the chat vector, or of what is combined", "差值或组合结果的系数"),
    )
    command.add_argument(
        "--onto",
        default="original",
        choices=("original", "nf4", "int8"),
        help=say("the base, or what training on a quantised one saw of it", "原始底座，或量化训练时所见的底座"),
    )
    command.add_argument("--out", required=True, help=say("folder of the merged model", "合并后的模型文件夹"))
    command.add_argument(
        "--dtype", default="base", choices=("base", "fp32", "bf16", "fp16"), help=say("number type", "数值类型")
    )
    command.add_argument(
        "--to",
        default="hf",
        choices=("hf", "pth"),
        help=say("Hugging Face, or LLaMA's own files", "Hugging Face，或 LLaMA 原始文件"),
    )
    command.add_argument(
        "--parity",
        default="streamed",
        choices=("streamed", "full"),
        help=say(
            "compare logits layer by layer, or with both models in memory",
            "逐层比较 logits，或两个模型同时载入内存比较",
        ),
    )
    command.add_argument(
        "--again", action="store_true", help=say("keep what stands there under another name", "把已有的改名保留")
    )
    command.add_argument(
        "--force",
        action="store_true",
        help=say(
            "merge onto another base than the adapter's own, or in another order",
            "合并到非原配的底座，或以别的顺序合并",
        ),
    )
    command = add(
        "convert",
        say(
            "a model in another form: Hugging Face, LLaMA's .pth, GGUF",
            "把模型转换为另一种格式：Hugging Face、LLaMA .pth、GGUF",
        ),
        _convert,
    )
    command.add_argument("source", metavar="SRC", help=say("model, or a folder of .pth files", "模型，或 .pth 文件夹"))
    command.add_argument("--to", required=True, choices=("hf", "pth", "gguf"), help=say("form", "格式"))
    command.add_argument("--out", required=True, metavar="D", help=say("folder", "文件夹"))
    command.add_argument(
        "--quantize",
        default="",
        metavar="TYPE",
        help=say("GGUF number type; f16 when absent", "GGUF 数值类型；不写为 f16"),
    )
    command.add_argument(
        "--again", action="store_true", help=say("anew; the old folder is kept", "重新转换；保留旧文件夹")
    )
    command.add_argument(
        "--push",
        default="",
        metavar="NAME",
        help=say(
            "send it to a hub: OWNER/NAME or modelscope:OWNER/NAME", "推送到 hub：OWNER/NAME 或 modelscope:OWNER/NAME"
        ),
    )
    command.add_argument(
        "--public", action="store_true", help=say("for everybody to see; else private", "公开；否则为私有")
    )

    command = add(
        "verify",
        say(
            "weights, tokenizer and adapter against known or recorded hashes",
            "用已知或记录的哈希核对权重、分词器与适配器",
        ),
        _verify,
    )
    command.add_argument("path", help=say("file or folder", "文件或文件夹"))
    command.add_argument(
        "--against",
        default="",
        metavar="LIST",
        help=say(
            "a file of hashes, or `known`: only what was published passes", "哈希清单文件，或 `known`：只接受已发布的"
        ),
    )
    command = add(
        "show",
        say(
            "what an artifact is and how it was made; or several runs compared",
            "这个文件夹是什么、怎么来的；或对比几次训练",
        ),
        _show,
    )
    command.add_argument("path", nargs="+", help=say("folder; several are compared", "文件夹；多个则对比"))
    command.add_argument(
        "--html", default="", metavar="FILE", help=say("draw the comparison into this page", "把对比画成此网页")
    )
    command = add(
        "doctor",
        say(
            "what this machine can do, and what it can reach; or what became of an old failure",
            "这台机器能做什么、能连到哪里；或某个旧故障如今怎样",
        ),
        _doctor,
    )
    command.add_argument("failure", nargs="?", default="", metavar="F-02", help=say("F-01 to F-48", "F-01 至 F-48"))


def _fetch(parsed: argparse.Namespace) -> int:
    if parsed.local_files_only:
        os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported, below
    from tongwen.commands import fetch

    return fetch.run(
        parsed.name,
        parsed.out,
        dev=parsed.dev,
        seed=parsed.seed,
        old_names=parsed.old_names,
        revision=parsed.revision,
        kind=parsed.kind,
        files=parsed.files,
        code=parsed.code,
        again=parsed.again,
    )


def _merge(parsed: argparse.Namespace) -> int:
    if parsed.chat_vector and not parsed.adapter:
        from tongwen.commands import chat_vector

        instruct, base = parsed.chat_vector
        return chat_vector.run(parsed.base, instruct, base, parsed.scale, parsed.out, again=parsed.again)
    from tongwen.core.errors import RecipeError
    from tongwen.stages import merge

    if parsed.chat_vector or not parsed.adapter:
        raise RecipeError(
            say("either adapters are merged, or a chat vector", "合并适配器与差值，二者择一"),
            place="tongwen merge",
            remedy="--adapter A [--adapter A2 …]   |   --chat-vector INSTRUCT BASE",
        )
    mix = (
        merge.mix_of(parsed.combine, parsed.adapter, parsed.weight, parsed.density, parsed.scale)
        if parsed.combine
        else None
    )
    choice = merge.MergeOptions(parsed.dtype, parsed.to, parsed.parity, parsed.onto, mix, force=parsed.force)
    return merge.command(parsed.base, parsed.adapter, parsed.out, choice, again=parsed.again)


def _convert(parsed: argparse.Namespace) -> int:
    from tongwen.commands import convert

    return convert.run(
        parsed.source,
        parsed.to,
        parsed.out,
        parsed.quantize,
        parsed.push,
        again=parsed.again,
        public=parsed.public,
    )


def _verify(parsed: argparse.Namespace) -> int:
    from tongwen.commands import verify

    return verify.run(parsed.path, parsed.against)


def _show(parsed: argparse.Namespace) -> int:
    if len(parsed.path) > 1 or parsed.html:
        from tongwen.commands import compare

        return compare.run(parsed.path, parsed.html)
    from tongwen.commands import show

    return show.run(parsed.path[0])


def _doctor(parsed: argparse.Namespace) -> int:
    from tongwen.commands import doctor

    return doctor.explain(parsed.failure) if parsed.failure else doctor.run()
