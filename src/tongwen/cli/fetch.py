"""The `tongwen fetch` command."""

from __future__ import annotations

import argparse
import os

from tongwen.cli.shared_arguments import SEED, number, whole_number
from tongwen.core.i18n import _


def summary() -> str:
    return _("fetch and verify public data sets, models and adapters by name")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "name",
        nargs="?",
        default="",
        metavar="NAME",
        help=_("a short name, OWNER/NAME or modelscope:OWNER/NAME; without it, list all"),
    )
    parser.add_argument(
        "--out",
        default="",
        metavar="DIR",
        help=_("folder; data/NAME or models/NAME by default"),
    )
    parser.add_argument(
        "--dev",
        type=number(0, 1),
        nargs="?",
        const=0.01,
        default=0.0,
        metavar="SHARE",
        help=_("split off this share of the rows"),
    )
    parser.add_argument("--seed", type=whole_number(0, SEED), default=42, help=_("seed of the split"))
    parser.add_argument("--old-names", action="store_true", help=_("use BELLE's old file names"))
    parser.add_argument("--revision", default="", help=_("branch, tag or commit"))
    parser.add_argument(
        "--kind",
        default="",
        choices=("model", "dataset"),
        help=_("which to fetch when the hub has both under this name"),
    )
    parser.add_argument(
        "--files",
        action="append",
        default=[],
        metavar="PATTERN",
        help=_("fetch only these files; !PATTERN excludes files"),
    )
    parser.add_argument(
        "--local-files-only",
        action="store_true",
        help=_("ask no hub: use the files on this machine, or fail"),
    )
    parser.add_argument("--code", action="store_true", help=_("fetch *.py too (never run here)"))
    parser.add_argument("--again", action="store_true", help=_("fetch again; the old folder is kept"))


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
