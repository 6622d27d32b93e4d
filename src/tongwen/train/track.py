"""Other programs that draw the curves of a run: transformers' own integrations, told which run this is.

`metrics.jsonl` is always written; what the recipe's `track` names gets the same numbers. A resumed run goes on in the
tracked run that it began, where the program can do that. Keys and addresses come from the environment alone.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tongwen.errors import MissingPackage
from tongwen.recipe.schema import Tracker

CURRENT: dict[str, Callable[[Any], Any]] = {  # the run that is told, if one is; only the first process has one
    "wandb": lambda module: module.run,
    "swanlab": lambda module: module.get_run(),
}


@dataclass(frozen=True)
class Track:
    """names: of the programs; title: of the run there; run: its id, the same when it is resumed; folder: for files."""

    names: Sequence[Tracker]
    title: str
    run: str
    folder: Path

    @property
    def arguments(self) -> dict[str, Any]:
        """As TrainingArguments."""
        others = [name for name in self.names if name != "tensorboard"]
        return {"report_to": others or "none", "run_name": f"{self.title}-{self.run[:8]}"}

    def callbacks(self, start: int) -> list[Any]:
        """TensorBoard's, which is asked to forget what the run wrote beyond the step that it starts from."""
        if "tensorboard" not in self.names:
            return []
        from torch.utils.tensorboard import SummaryWriter
        from transformers.integrations import TensorBoardCallback

        return [TensorBoardCallback(SummaryWriter(str(self.folder), purge_step=start + 1 if start else None))]

    @contextmanager
    def told(self) -> Iterator[None]:
        """The environment says which run it is, where the user's own does not."""
        run = f"{self.title}-{self.run}"
        words = {
            "WANDB_RUN_ID": run,
            "WANDB_RESUME": "allow",
            "SWANLAB_RUN_ID": hashlib.sha256(run.encode()).hexdigest()[:21],  # it takes no other form
            "SWANLAB_RESUME": "allow",
        }
        ours = {name: value for name, value in words.items() if name not in os.environ}
        os.environ.update(ours)
        try:
            yield
        finally:
            for name in ours:
                del os.environ[name]
            for name, run_of in CURRENT.items():  # the next phase is a run of its own there
                if name in self.names and name in sys.modules and run_of(sys.modules[name]):
                    sys.modules[name].finish()


def check(names: Sequence[Tracker]) -> None:
    """Raises MissingPackage for the first program that is not installed."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise MissingPackage(name, f"track: {name}", name)
