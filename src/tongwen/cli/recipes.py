"""What is done with a recipe: run it, check it, plan it, look at it, begin one."""

from __future__ import annotations

import argparse
from typing import Any

from tongwen.cli import Add
from tongwen.core.i18n import say


def add_to(add: Add) -> None:
    """Add these commands."""
    command = add(
        "demo",
        say("the whole pipeline on a small real model, on a laptop CPU", "在笔记本 CPU 上用真实小模型走完整个流程"),
        _demo,
    )
    command.add_argument("--out", default="runs/demo", help=say("folder of the run", "输出文件夹"))
    command.add_argument(
        "--model",
        default="",
        help=say(
            "folder of the model, instead of fetching SmolLM2-135M-Instruct",
            "模型文件夹，代替下载 SmolLM2-135M-Instruct",
        ),
    )
    command = add("run", say("run the stages of a recipe", "运行配方中的各阶段"), _run)
    _add_recipe(command)
    command.add_argument("--only", default="", metavar="STAGE", help=say("this stage alone", "只运行这一阶段"))
    command.add_argument(
        "--from", dest="start", default="", metavar="STAGE", help=say("this stage and the later ones", "从这一阶段起")
    )
    command.add_argument("--until", default="", metavar="STAGE", help=say("up to this stage", "到这一阶段止"))
    _add_devices(command)
    command.add_argument(
        "--again",
        action="store_true",
        help=say(
            "redo what changed and all after it; the old folders are kept", "重做已改变的阶段及其后各阶段；旧文件夹保留"
        ),
    )
    command.add_argument(
        "--fork",
        action="store_true",
        help=say("continue an interrupted stage with changed settings", "以改变后的设置继续被中断的阶段"),
    )
    command = add(
        "check", say("read the recipe and the data; no model, no torch", "读配方与数据；不需要模型与 torch"), _check
    )
    _add_recipe(command)
    command = add(
        "plan",
        say(
            "batch sizes, tokens, steps, memory, disk and time; touches nothing",
            "批大小、token、步数、内存、磁盘与时间；不写任何东西",
        ),
        _plan,
    )
    _add_recipe(command)
    command.add_argument(
        "--gpu", metavar="24GB", help=say("a GPU of this memory that is not here", "假设有这么大显存的 GPU")
    )
    _add_devices(command)
    command.add_argument(
        "--measure",
        action="store_true",
        help=say("open the model and time a micro-batch here", "打开模型，在本机实测一个微批的用时"),
    )
    command = add(
        "look", say("encoded samples, learned tokens coloured", "查看编码后的样本，学习的 token 有颜色"), _look
    )
    _add_recipe(command)
    command.add_argument("-n", type=int, default=3, help=say("how many", "几个"))
    command.add_argument("--html", default="", metavar="FILE", help=say("write a page instead", "写成网页"))
    command = add("init", say("a commented recipe to start from", "生成一份带注释的配方"), _init)
    command.add_argument(
        "template", nargs="?", default="", help=say("which one; without it they are listed", "哪一份；不写则列出")
    )
    command.add_argument("--out", default="", metavar="FILE", help=say("write it here", "写到此文件"))
    command = add("schema", say("every word of a recipe", "配方的每一个词"), _schema)
    command.add_argument("section", nargs="?", default="", help=say("one section", "某一段"))


def _add_recipe(command: argparse.ArgumentParser) -> None:
    command.add_argument("recipe", help=say("recipe file", "配方文件"))
    command.add_argument(
        "overrides",
        nargs="*",
        metavar="section.key=value",
        help=say("change a word of the recipe", "改动配方中的一个词"),
    )


def _add_devices(command: argparse.ArgumentParser) -> None:
    command.add_argument("--devices", type=int, help=say("processes, one per GPU", "进程数，每块 GPU 一个"))


def _load(parsed: argparse.Namespace) -> Any:
    from tongwen.core import console, distributed
    from tongwen.recipe.load import load_recipe

    recipe, notices = load_recipe(parsed.recipe, _overrides(parsed))
    for notice in () if distributed.is_ours() else notices:  # whose command has said them
        console.notice(notice)
    return recipe


def _overrides(parsed: argparse.Namespace) -> list[str]:
    """Those of the command line; `--devices` is one of them."""
    devices = getattr(parsed, "devices", None)
    return [*parsed.overrides, *([f"devices={devices}"] if devices is not None else [])]


def _demo(parsed: argparse.Namespace) -> int:
    from tongwen.commands import demo
    from tongwen.stages.base import STAGES

    return demo.run(parsed.out, parsed.model, STAGES)


def _run(parsed: argparse.Namespace) -> int:
    from tongwen.core import console
    from tongwen.stages.base import STAGES
    from tongwen.workflows import pipeline

    recipe = _load(parsed)
    done = pipeline.run(
        recipe,
        [parsed.recipe, *_overrides(parsed)],
        STAGES,
        only=parsed.only,
        start=parsed.start,
        until=parsed.until,
        again=parsed.again,
        fork=parsed.fork,
    )
    console.emit({"out": recipe.out, "stages": {found.path.name: found.manifest for found in done}})
    return 0


def _check(parsed: argparse.Namespace) -> int:
    from tongwen.commands import check

    return check.run(_load(parsed))


def _plan(parsed: argparse.Namespace) -> int:
    from tongwen.commands import plan
    from tongwen.stages.base import STAGES

    return plan.run(_load(parsed), parsed.gpu, STAGES, measure=parsed.measure)


def _look(parsed: argparse.Namespace) -> int:
    from tongwen.commands import look

    return look.run(_load(parsed), parsed.n, parsed.html)


def _init(parsed: argparse.Namespace) -> int:
    from tongwen.commands import init

    return init.run(parsed.template, parsed.out)


def _schema(parsed: argparse.Namespace) -> int:
    from tongwen.recipe import docs

    return docs.run(parsed.section)
