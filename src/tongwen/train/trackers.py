"""Other programs that draw the curves of a run: transformers' own integrations, told which run this is.

`metrics.jsonl` is always written; what the recipe's `track` names gets the same numbers. A resumed run goes on in the
tracked run that it began. Keys and addresses come from the environment alone. A program that cannot begin ends the run
before it trains; one that fails later is said, and the training goes on without it.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

from tongwen.core import artifact, console
from tongwen.core.errors import MachineError, MissingPackage, first_line
from tongwen.core.i18n import _
from tongwen.recipe.schema import TrackerName

CURRENT_RUN: dict[str, Callable[[Any], Any]] = {  # the run that is told, if one is; only the first process has one
    "wandb": lambda module: module.run,
    "swanlab": lambda module: module.get_run(),
}
KEYS: dict[str, tuple[str, ...]] = {
    "wandb": ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE"),
    "swanlab": ("SWANLAB_API_KEY",),
}
KEYLESS_MODES = ("offline", "disabled", "dryrun", "local")  # values of WANDB_MODE and SWANLAB_MODE that need no key
LOGINS: dict[str, dict[str, str]] = {  # where a login has left a key, or a setting its wish, and what then stands there
    "wandb": {
        **dict.fromkeys(("$NETRC", "~/.netrc", "~/_netrc"), "wandb"),
        **dict.fromkeys(("wandb/settings", "~/.config/wandb/settings"), "="),
    },
    "swanlab": dict.fromkeys(("$SWANLAB_SAVE_DIR/.netrc", "~/.swanlab/.netrc"), "machine"),
}
CONNECT_SECONDS = 5.0  # in which a server answers
IDS = "mlflow.json"  # in the stage's folder: by title, the run that MLflow has given it


@dataclass(frozen=True)
class TrackerRun:
    """names: of the programs; title: of the run there; run: its id, the same when it is resumed; folder: of the stage;
    phase: its name, where there are several; required: whether a program that cannot begin ends the run."""

    names: Sequence[TrackerName]
    title: str
    run: str
    folder: Path
    phase: str = ""
    required: bool = True

    @property
    def arguments(self) -> dict[str, Any]:
        """As TrainingArguments. The integrations are called by a Teller."""
        return {"report_to": "none", "run_name": f"{self.title}-{self.run[:8]}"}

    def make_callback(self, name: TrackerName, start: int) -> Any:
        """The program's callback. TensorBoard's is asked to forget what the run wrote beyond the step that it starts from."""
        from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

        words = []
        if name == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter

            place = self.folder.joinpath("tensorboard", self.phase)
            words = [SummaryWriter(str(place), purge_step=start + 1 if start else None)]
        return INTEGRATION_TO_CALLBACK[name](*words)

    @contextmanager
    def environment(self) -> Iterator[None]:
        """The environment says which run it is, where the user's own does not."""
        run = f"{self.title}-{self.run}"
        words = {
            "WANDB_RUN_ID": run,
            "WANDB_RESUME": "allow",
            "SWANLAB_RUN_ID": hashlib.sha256(run.encode()).hexdigest()[:21],  # it takes no other form
            "SWANLAB_RESUME": "allow",
        }
        if known := self._ids().get(self.title):
            words["MLFLOW_RUN_ID"] = known
        ours = {name: value for name, value in words.items() if name not in os.environ}
        os.environ.update(ours)
        try:
            yield
        finally:
            for name in ours:
                os.environ.pop(name, None)  # MLflow has taken its own
            for name, run_of in CURRENT_RUN.items():  # the next phase is a run of its own there
                if name in self.names and name in sys.modules:
                    with reporting_failures(name):
                        if run_of(sys.modules[name]):
                            sys.modules[name].finish()

    def save_mlflow_id(self) -> None:
        """MLflow takes no id of ours: the one that it has given is kept for the run that is resumed."""
        if active := sys.modules["mlflow"].active_run():
            artifact.write_json(self.folder / IDS, {**self._ids(), self.title: active.info.run_id})

    def _ids(self) -> dict[str, str]:
        file = self.folder / IDS
        try:
            return dict(json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else {}
        except (OSError, ValueError, TypeError):
            return {}  # then it is another run there


class TrackerCallback:
    """A callback that calls those of all programs, none of which may end a training that goes on."""

    def __init__(self, tracker: TrackerRun, start: int) -> None:
        self.tracker, self.programs = tracker, dict[str, Any]()
        for name in tracker.names:
            with reporting_failures(name, required=tracker.required):
                self.programs[name] = tracker.make_callback(name, start)

    def __getattr__(self, event: str) -> Any:
        if not event.startswith("on_"):
            raise AttributeError(event)

        def dispatch(*args: Any, **kwargs: Any) -> None:
            for name in list(self.programs):
                with reporting_failures(name, required=self.tracker.required and event == "on_train_begin"):
                    callback = self.programs.pop(name)
                    getattr(callback, event)(*args, **kwargs)
                    if name == "mlflow" and event == "on_train_begin":
                        self.tracker.save_mlflow_id()
                    self.programs[name] = callback

        return dispatch


@contextmanager
def reporting_failures(name: str, *, required: bool = False) -> Iterator[None]:
    """What a program raises is a line for the user; and a MachineError, if it must be there."""
    try:
        yield
    except Exception as error:
        why = first_line(error)
        if required:
            raise _tracker_error(name, _("it cannot start: {why}").format(why=why)) from error
        console.notice(
            _("{name} failed: {why}; training continues without it, and metrics.jsonl has every line").format(
                name=name, why=why
            )
        )


def check(names: Sequence[TrackerName]) -> None:
    """Raises MissingPackage for the first program that is not installed, and MachineError for one without a key or a server."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise MissingPackage(name, f"track: {name}", name)
        if name in KEYS and not _has_key(name):
            raise _tracker_error(name, _("no key is set for it"), f"{KEYS[name][0]}=…")
        if name == "mlflow":
            _check_server(os.environ.get("MLFLOW_TRACKING_URI", ""))


def _has_key(name: str) -> bool:
    if any(os.environ.get(variable) for variable in KEYS[name]):
        return True
    if os.environ.get(f"{name.upper()}_MODE") in KEYLESS_MODES:
        return True
    if name == "wandb" and (os.environ.get("WANDB_DISABLED", "").lower() == "true" or "WANDB_BASE_URL" in os.environ):
        return True  # a server of one's own has a name, and perhaps a key, of its own
    files = ((Path(os.path.expandvars(file)).expanduser(), word) for file, word in LOGINS[name].items())
    return any(file.is_file() and word in file.read_text(encoding="utf-8", errors="replace") for file, word in files)


def _check_server(address: str) -> None:
    """Raise MachineError when nobody listens there: MLflow itself would try for minutes. Behind a proxy this cannot be seen."""
    scheme = address.partition(":")[0]
    if scheme not in ("http", "https") or scheme in getproxies():
        return
    server = scheme  # a password may stand before the rest
    try:
        parts = urlsplit(address)
        server = f"{scheme}://{parts.hostname or ''}"
        if not parts.hostname:
            raise ValueError(_("the address has no host name"))
        socket.create_connection(
            (parts.hostname, parts.port or {"http": 80, "https": 443}[scheme]), CONNECT_SECONDS
        ).close()
    except (OSError, ValueError) as error:
        raise _tracker_error(
            "mlflow",
            _("{server} does not answer: {error}").format(server=server, error=error),
            "MLFLOW_TRACKING_URI=…",
        ) from None


def _tracker_error(name: str, what: str, cure: str = "") -> MachineError:
    offline = {"wandb": "WANDB_MODE=offline", "swanlab": "SWANLAB_MODE=offline"}.get(name)
    ways = [way for way in (cure, offline, _("remove it from `track`")) if way]
    return MachineError(what, place=f"track: {name}", remedy=_(" or ").join(ways))
