"""The `tongwen doctor` command."""

from __future__ import annotations

import argparse

from tongwen.core.i18n import say


def summary() -> str:
    return say(
        "what this machine can do and reach; or explain an old failure",
        "这台机器能做什么、能连到哪里；或某个旧故障如今怎样",
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("failure", nargs="?", default="", metavar="F-02", help=say("F-01 to F-48", "F-01 至 F-48"))


def run(arguments: argparse.Namespace) -> int:
    from tongwen.commands import doctor

    return doctor.explain(arguments.failure) if arguments.failure else doctor.run()
