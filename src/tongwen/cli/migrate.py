"""The `tongwen migrate` command."""

from __future__ import annotations

import argparse

from tongwen.cli.shared_arguments import number
from tongwen.core.i18n import _


def summary() -> str:
    return _("turn an older project's command or files into a recipe or command")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "inputs",
        nargs="*",
        metavar="FILE",
        help=_(
            "run_config/*.json, DeepSpeed's JSON, LLaMA-Factory's YAML, a shell script, an adapter's folder; or: -- OLD COMMAND …"
        ),
    )
    parser.add_argument("--run", action="store_true", help=_("also run it"))
    parser.add_argument(
        "--out",
        default="",
        metavar="FILE",
        help=_("write the recipe, or the adapter, to this place"),
    )
    parser.add_argument(
        "--alpha",
        type=number(1e-6, 1e6),
        metavar="N",
        help=_("scale (lora_alpha) of an adapter without a config"),
    )


def run(arguments: argparse.Namespace) -> int:
    from tongwen.commands import migrate

    for command, last in migrate.run(arguments.inputs, arguments.out, arguments.alpha, to_run=arguments.run):
        if not arguments.run:
            continue
        json = ["--json"] if arguments.json and last else []
        if code := arguments.main([*command, *json]):
            return int(code)
    return 0
