"""Send a run's metrics to experiment trackers through transformers' integrations.

`metrics.jsonl` is always written; the trackers in the recipe's `track` get the same numbers. A resumed run continues the
tracked run that it began. Keys and addresses come from the environment alone. A tracker that cannot start ends the run
before training; one that fails later is reported, and training continues without it.
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

CURRENT_RUN: dict[
    str, Callable[[Any], Any]
] = {  # returns the active tracked run, if any; only the first process has one
    "wandb": lambda module: module.run,
    "swanlab": lambda module: module.get_run(),
}
KEYS: dict[str, tuple[str, ...]] = {
    "wandb": ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE"),
    "swanlab": ("SWANLAB_API_KEY",),
}
KEYLESS_MODES = ("offline", "disabled", "dryrun", "local")  # values of WANDB_MODE and SWANLAB_MODE that need no key
LOGINS: dict[str, dict[str, str]] = {  # files with a saved key or setting, and the text they contain then
    "wandb": {
        **dict.fromkeys(("$NETRC", "~/.netrc", "~/_netrc"), "wandb"),
        **dict.fromkeys(("wandb/settings", "~/.config/wandb/settings"), "="),
    },
    "swanlab": dict.fromkeys(("$SWANLAB_SAVE_DIR/.netrc", "~/.swanlab/.netrc"), "machine"),
}
CONNECT_SECONDS = 5.0  # timeout for a server's answer
IDS = "mlflow.json"  # in the stage's folder: MLflow's run id by title


@dataclass(frozen=True)
class TrackerRun:
    """A run as the trackers see it.

    names: of the trackers; title: of the tracked run; run: its id, the same when resumed; folder: of the stage; phase: its
    name, if there are several; required: whether a tracker that cannot start ends the run
    """

    names: Sequence[TrackerName]
    title: str
    run: str
    folder: Path
    phase: str = ""
    required: bool = True

    @property
    def arguments(self) -> dict[str, Any]:
        """For TrainingArguments. TrackerCallback calls the integrations, so transformers must not."""
        return {"report_to": "none", "run_name": f"{self.title}-{self.run[:8]}"}

    def make_callback(self, name: TrackerName, start: int) -> Any:
        """Return the tracker's callback. TensorBoard purges what the run wrote beyond the step it starts from."""
        from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

        args = []
        if name == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter

            log_dir = self.folder.joinpath("tensorboard", self.phase)
            args = [SummaryWriter(str(log_dir), purge_step=start + 1 if start else None)]
        return INTEGRATION_TO_CALLBACK[name](*args)

    @contextmanager
    def environment(self) -> Iterator[None]:
        """Inside, environment variables identify the run, unless the user has set them."""
        run = f"{self.title}-{self.run}"
        variables = {
            "WANDB_RUN_ID": run,
            "WANDB_RESUME": "allow",
            "SWANLAB_RUN_ID": hashlib.sha256(run.encode()).hexdigest()[:21],  # the only form swanlab accepts
            "SWANLAB_RESUME": "allow",
        }
        if known := self._ids().get(self.title):
            variables["MLFLOW_RUN_ID"] = known
        ours = {name: value for name, value in variables.items() if name not in os.environ}
        os.environ.update(ours)
        try:
            yield
        finally:
            for name in ours:
                os.environ.pop(name, None)  # MLflow deletes its own
            for name, run_of in CURRENT_RUN.items():  # the next phase is a separate tracked run
                if name in self.names and name in sys.modules:
                    with reporting_failures(name):
                        if run_of(sys.modules[name]):
                            sys.modules[name].finish()

    def save_mlflow_id(self) -> None:
        """Save the run id that MLflow has assigned, for a resumed run: MLflow does not accept ours."""
        if active := sys.modules["mlflow"].active_run():
            artifact.write_json(self.folder / IDS, {**self._ids(), self.title: active.info.run_id})

    def _ids(self) -> dict[str, str]:
        file = self.folder / IDS
        try:
            return dict(json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else {}
        except (OSError, ValueError, TypeError):
            return {}  # then MLflow starts another run


class TrackerCallback:
    """Call the callbacks of all trackers; none may end a training in progress."""

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
    """Report a tracker's exception in a notice, or if it is required, raise it as MachineError."""
    try:
        yield
    except Exception as error:
        reason = first_line(error)
        if required:
            raise _tracker_error(name, _("it cannot start: {why}").format(why=reason)) from error
        console.notice(
            _("{name} failed: {why}; training continues without it, and metrics.jsonl has every line").format(
                name=name, why=reason
            )
        )


def check(names: Sequence[TrackerName]) -> None:
    """Raise MissingPackage for the first tracker that is not installed, MachineError for one without a key or server."""
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
        return True  # a self-hosted server has its own host name in the file, and perhaps its own key
    files = ((Path(os.path.expandvars(file)).expanduser(), marker) for file, marker in LOGINS[name].items())
    return any(
        file.is_file() and marker in file.read_text(encoding="utf-8", errors="replace") for file, marker in files
    )


def _check_server(address: str) -> None:
    """Raise MachineError when no server listens; MLflow itself would try for minutes. Behind a proxy nothing is checked."""
    scheme = address.partition(":")[0]
    if scheme not in ("http", "https") or scheme in getproxies():
        return
    server = scheme  # without the rest, which may contain a password
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


def _tracker_error(name: str, problem: str, remedy: str = "") -> MachineError:
    offline = {"wandb": "WANDB_MODE=offline", "swanlab": "SWANLAB_MODE=offline"}.get(name)
    ways = [way for way in (remedy, offline, _("remove it from `track`")) if way]
    return MachineError(problem, place=f"track: {name}", remedy=_(" or ").join(ways))
