"""The `tongwen migrate` command."""

from __future__ import annotations

import argparse

from tongwen.core.i18n import say


def summary() -> str:
    return say(
        "an older project's command or files as a recipe or a command",
        "旧项目的命令或文件：得到配方，或完成同样工作的命令",
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "words",
        nargs="*",
        metavar="FILE",
        help=say(
            "run_config/*.json, DeepSpeed's JSON, LLaMA-Factory's YAML, a shell script, an adapter's folder; or: -- OLD COMMAND …",
            "run_config/*.json、DeepSpeed 的 JSON、LLaMA-Factory 的 YAML、shell 脚本、适配器文件夹；或：-- 旧命令 …",
        ),
    )
    parser.add_argument("--run", action="store_true", help=say("and run it", "并运行"))
    parser.add_argument(
        "--out",
        default="",
        metavar="FILE",
        help=say("write the recipe, or the adapter, here", "把配方或适配器写到此处"),
    )
    parser.add_argument(
        "--alpha",
        type=float,
        metavar="N",
        help=say("scale (lora_alpha) of an adapter without a config", "没有配置的适配器的缩放（lora_alpha）"),
    )


def run(arguments: argparse.Namespace) -> int:
    from tongwen.commands import migrate

    for command, last in migrate.run(arguments.words, arguments.out, arguments.alpha, to_run=arguments.run):
        if not arguments.run:
            continue
        json = ["--json"] if arguments.json and last else []
        if code := arguments.main([*command, *json]):
            return int(code)
    return 0
