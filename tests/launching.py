"""Run commands in forked processes, as torchrun and srun do but without importing torch again in each; and kill them."""

from __future__ import annotations

import gc
import importlib.util
import os
import signal
import socket
import time
from collections.abc import Callable
from typing import Any

import pytest

import tongwen.workflows.data_preparation
import tongwen.workflows.merging
import tongwen.workflows.training.dialogues
import tongwen.workflows.training.job  # noqa: F401 (imported here, once for all children)
from tongwen.cli.main import main
from tongwen.train.trainer import PlannedTrainer

needs_deepspeed = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed")


def run_ranks(
    world: int, *arguments: object, before: Callable[[int], Any] | None = None, seconds: float = 90
) -> list[int]:
    """Run a command in `world` processes as a launcher does; return their exit codes, negative for a signal.

    before: called in each process with its rank. Fails when the processes do not end.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = [_start(rank, world, port, arguments, before) for rank in range(world)]
    codes, end = dict[int, int](), time.monotonic() + seconds
    while len(codes) < world:
        for child in children:
            if child not in codes and (done := os.waitpid(child, os.WNOHANG))[0]:
                codes[child] = os.waitstatus_to_exitcode(done[1])
        if time.monotonic() > end:
            for child in set(children) - set(codes):
                os.kill(child, 9)
            raise AssertionError(f"processes hang; the others ended with {list(codes.values())}")
        time.sleep(0.02)
    return [codes[child] for child in children]


def _start(rank: int, world: int, port: int, arguments: tuple[object, ...], before: Callable[[int], Any] | None) -> int:
    child = os.fork()
    if child:
        return child
    try:
        gc.freeze()  # what other tests left in this process is never collected here: native objects with threads crash
        variables = {
            "RANK": rank,
            "LOCAL_RANK": rank,
            "WORLD_SIZE": world,
            "LOCAL_WORLD_SIZE": world,
            "MASTER_PORT": port,
        }
        os.environ.update({name: str(value) for name, value in variables.items()}, MASTER_ADDR="127.0.0.1")
        if before:
            before(rank)
        os._exit(main([str(argument) for argument in arguments]))
    except BaseException:  # a forked test must never return
        import traceback

        traceback.print_exc()
        os._exit(99)


def run_forked(*arguments: object, before: Any = None) -> int:
    """Run a command in a forked process, so that it may be killed; return its wait status."""
    child = os.fork()
    if not child:
        try:
            gc.freeze()
            if before:
                before()
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            os._exit(main([str(argument) for argument in arguments]))
        except BaseException:  # a forked test must never return
            os._exit(99)
    return os.waitpid(child, 0)[1]


def kill_at_step(step: int, phase: int = 0) -> Any:
    """Return a function that makes a forked command kill itself after `step` steps, of `phase` if there are several."""

    def install() -> None:
        original = PlannedTrainer.training_step

        def step_or_kill(self: Any, *arguments: Any, **options: Any) -> Any:
            in_phase = not phase or self.job.phase.checkpoints.name == f"phase-{phase}"
            if in_phase and self.state.global_step == step:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(self, *arguments, **options)

        PlannedTrainer.training_step = step_or_kill  # type: ignore[method-assign]

    return install
