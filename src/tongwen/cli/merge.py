"""The `tongwen merge` command."""

from __future__ import annotations

import argparse

from tongwen.cli.shared_arguments import number
from tongwen.core.i18n import _


def summary() -> str:
    return _("merge adapters into their base")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--base", required=True, help=_("model"))
    _add_merge_inputs(parser)
    parser.add_argument("--out", required=True, help=_("folder of the merged model"))
    parser.add_argument("--dtype", default="base", choices=("base", "fp32", "bf16", "fp16"), help=_("dtype"))
    parser.add_argument(
        "--to",
        default="hf",
        choices=("hf", "pth"),
        help=_("Hugging Face, or LLaMA's own files"),
    )
    parser.add_argument(
        "--parity",
        default="streamed",
        choices=("streamed", "full"),
        help=_("compare logits layer by layer, or with both models in memory"),
    )
    parser.add_argument("--again", action="store_true", help=_("merge again; keep the old folder under another name"))
    parser.add_argument(
        "--force",
        action="store_true",
        help=_("allow a base that is not the adapter's own, or another order of adapters"),
    )
    parser.set_defaults(writes=True)


def _add_merge_inputs(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--adapter",
        default=[],
        action="append",
        help=_("adapter folder; give several in the order of their training"),
    )
    parser.add_argument(
        "--chat-vector",
        nargs=2,
        metavar=("INSTRUCT", "BASE"),
        help=_("instead: add the difference between INSTRUCT and BASE to a model that descends from BASE"),
    )
    parser.add_argument(
        "--combine",
        default="",
        choices=("linear", "ties"),
        help=_(
            "combine adapters that were trained separately on one base, as a sum or by TIES, instead of stacking them"
        ),
    )
    parser.add_argument(
        "--weight",
        type=number(-1000, 1000),
        action="append",
        default=[],
        metavar="W",
        help=_("weight of each combined adapter; equal by default"),
    )
    parser.add_argument(
        "--density",
        type=number(0, 1),
        default=0.2,
        help=_("share of each adapter's changes that TIES keeps"),
    )
    parser.add_argument(
        "--scale",
        type=number(-1000, 1000),
        default=1.0,
        help=_("factor of the chat vector, or of the combined adapters"),
    )
    parser.add_argument(
        "--onto",
        default="original",
        choices=("original", "nf4", "int8"),
        help=_("merge into the original base, or into the quantised weights that training saw"),
    )


def run(arguments: argparse.Namespace) -> int:
    if arguments.chat_vector and not arguments.adapter:
        from tongwen.commands import merge_chat_vector

        instruct, base = arguments.chat_vector
        return merge_chat_vector.run(
            arguments.base, instruct, base, arguments.scale, arguments.out, again=arguments.again
        )
    from tongwen.commands import merge
    from tongwen.core.errors import RecipeError
    from tongwen.workflows.merging import MergeOptions

    if arguments.chat_vector or not arguments.adapter:
        raise RecipeError(
            _("merge either adapters or a chat vector, not both"),
            place="tongwen merge",
            remedy="--adapter A [--adapter A2 …]   |   --chat-vector INSTRUCT BASE",
        )
    combination = (
        merge.make_combination(
            arguments.combine, arguments.adapter, arguments.weight, arguments.density, arguments.scale
        )
        if arguments.combine
        else None
    )
    options = MergeOptions(
        arguments.dtype, arguments.to, arguments.parity, arguments.onto, combination, force=arguments.force
    )
    return merge.run(arguments.base, arguments.adapter, arguments.out, options, again=arguments.again)
