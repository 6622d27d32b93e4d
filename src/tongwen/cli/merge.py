"""The `tongwen merge` command."""

from __future__ import annotations

import argparse

from tongwen.core.i18n import say


def summary() -> str:
    return say("merge adapters into their base", "把适配器并入底座")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--base", required=True, help=say("model", "模型"))
    _add_what_is_merged(parser)
    parser.add_argument("--out", required=True, help=say("folder of the merged model", "合并后的模型文件夹"))
    parser.add_argument(
        "--dtype", default="base", choices=("base", "fp32", "bf16", "fp16"), help=say("number type", "数值类型")
    )
    parser.add_argument(
        "--to",
        default="hf",
        choices=("hf", "pth"),
        help=say("Hugging Face, or LLaMA's own files", "Hugging Face，或 LLaMA 原始文件"),
    )
    parser.add_argument(
        "--parity",
        default="streamed",
        choices=("streamed", "full"),
        help=say(
            "compare logits layer by layer, or with both models in memory",
            "逐层比较 logits，或两个模型同时载入内存比较",
        ),
    )
    parser.add_argument(
        "--again", action="store_true", help=say("keep the old folder under another name", "把已有的改名保留")
    )
    parser.add_argument(
        "--force",
        action="store_true",
        help=say(
            "merge onto a base that is not the adapter's own, or in another order",
            "合并到非原配的底座，或以别的顺序合并",
        ),
    )


def _add_what_is_merged(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--adapter",
        default=[],
        action="append",
        help=say("adapter folder; several in the order in which they were trained", "适配器文件夹；多个则按训练的先后"),
    )
    parser.add_argument(
        "--chat-vector",
        nargs=2,
        metavar=("INSTRUCT", "BASE"),
        help=say(
            "instead: add what INSTRUCT has over BASE to a model that descends from BASE",
            "或：把 INSTRUCT 相对 BASE 的差值加到同源的模型上",
        ),
    )
    parser.add_argument(
        "--combine",
        default="",
        choices=("linear", "ties"),
        help=say(
            "combine adapters that were trained separately on one base, as a sum or by TIES, instead of one upon the other",
            "不是依次叠加，而是组合在同一底座上分别训练的适配器：求和，或 TIES",
        ),
    )
    parser.add_argument(
        "--weight",
        type=float,
        action="append",
        default=[],
        metavar="W",
        help=say("of each adapter that is combined; equal shares when absent", "被组合的各适配器的权重；不写则均等"),
    )
    parser.add_argument(
        "--density",
        type=float,
        default=0.2,
        help=say("share of each adapter's changes that TIES keeps", "TIES 保留的改变的比例"),
    )
    parser.add_argument(
        "--scale",
        type=float,
        default=1.0,
        help=say("of the chat vector, or of the combined adapters", "差值或组合结果的系数"),
    )
    parser.add_argument(
        "--onto",
        default="original",
        choices=("original", "nf4", "int8"),
        help=say("the base, or its quantised weights as training saw them", "原始底座，或量化训练时所见的底座"),
    )


def run(arguments: argparse.Namespace) -> int:
    if arguments.chat_vector and not arguments.adapter:
        from tongwen.commands import chat_vector

        instruct, base = arguments.chat_vector
        return chat_vector.run(arguments.base, instruct, base, arguments.scale, arguments.out, again=arguments.again)
    from tongwen.core.errors import RecipeError
    from tongwen.stages import merge

    if arguments.chat_vector or not arguments.adapter:
        raise RecipeError(
            say("either adapters are merged, or a chat vector", "合并适配器与差值，二者择一"),
            place="tongwen merge",
            remedy="--adapter A [--adapter A2 …]   |   --chat-vector INSTRUCT BASE",
        )
    mix = (
        merge.mix_of(arguments.combine, arguments.adapter, arguments.weight, arguments.density, arguments.scale)
        if arguments.combine
        else None
    )
    options = merge.MergeOptions(
        arguments.dtype, arguments.to, arguments.parity, arguments.onto, mix, force=arguments.force
    )
    return merge.command(arguments.base, arguments.adapter, arguments.out, options, again=arguments.again)
