"""The `tongwen launch` command."""

from __future__ import annotations

import argparse

from tongwen.cli import recipe_arguments
from tongwen.cli.shared_arguments import whole_number
from tongwen.core.i18n import _

MOST = 10_000  # of machines, and of GPUs in one


def summary() -> str:
    return _("write the job of a recipe for Slurm, SkyPilot or Kubeflow")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    recipe_arguments.add_recipe(parser)
    parser.add_argument(
        "--to", required=True, choices=("slurm", "skypilot", "kubeflow"), help=_("scheduler that runs the job")
    )
    parser.add_argument(
        "--devices",
        type=whole_number(1, MOST),
        help=_("processes on each machine, one per GPU; absent: the recipe's devices, shared out"),
    )
    parser.add_argument("--nodes", type=whole_number(1, MOST), default=1, help=_("machines"))
    parser.add_argument(
        "--gpu", default="80GB", metavar="NAME", help=_("skypilot: a GPU's name, or its memory at least; default 80GB")
    )
    parser.add_argument("--image", default="", help=_("kubeflow: container image that has tongwen"))
    parser.add_argument(
        "--volume", default="", metavar="CLAIM", help=_("kubeflow: volume claim that holds the recipe's folder")
    )
    parser.add_argument("--out", required=True, metavar="FILE", help=_("write the job to this file"))


def run(arguments: argparse.Namespace) -> int:
    from tongwen.commands import launch

    devices, arguments.devices = arguments.devices, None  # here: on each machine, so no override of the recipe's
    recipe = recipe_arguments.load(arguments)
    job = launch.make_job(recipe, arguments.recipe, arguments.overrides, devices, arguments.nodes)
    return launch.run(
        job, arguments.to, arguments.out, gpu=arguments.gpu, image=arguments.image, volume=arguments.volume
    )
