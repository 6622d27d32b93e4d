"""What leads here from older projects: migrate."""

from __future__ import annotations

import argparse

from tongwen.cli import Add
from tongwen.core.i18n import say


def add_to(add: Add) -> None:
    """Add these commands."""
    command = add(
        "migrate",
        say(
            "a command or the files of an older project: the recipe, or the command that does it",
            "旧项目的命令或文件：得到配方，或完成同样工作的命令",
        ),
        _migrate,
    )
    command.add_argument(
        "words",
        nargs="*",
        metavar="FILE",
        help=say(
            "run_config/*.json, DeepSpeed's JSON, LLaMA-Factory's YAML, a shell script, an adapter's folder; or: -- OLD COMMAND …",
            "run_config/*.json、DeepSpeed 的 JSON、LLaMA-Factory 的 YAML、shell 脚本、适配器文件夹；或：-- 旧命令 …",
        ),
    )
    command.add_argument("--run", action="store_true", help=say("and run it", "并运行"))
    command.add_argument(
        "--out",
        default="",
        metavar="FILE",
        help=say("write the recipe, or the adapter, here", "把配方或适配器写到此处"),
    )
    command.add_argument(
        "--alpha",
        type=float,
        metavar="N",
        help=say("scale (lora_alpha) of an adapter without a config", "没有配置的适配器的缩放（lora_alpha）"),
    )


def _migrate(parsed: argparse.Namespace) -> int:
    from tongwen.cli.main import main
    from tongwen.commands import migrate

    for command, last in migrate.run(parsed.words, parsed.out, parsed.alpha, to_run=parsed.run):
        if parsed.run and (code := main([*command, *(["--json"] if parsed.json and last else [])])):
            return code
    return 0
