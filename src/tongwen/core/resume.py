"""Decide whether an interrupted run may continue: which settings must be the same, and which may change.

A training stage writes `run.json` into its unfinished folder: the id of the run, its settings, and the fingerprints of its
inputs. The same command continues only when all of them are the same; options that do not affect the result are not among
the settings. `--fork` continues with other settings under a new id and keeps the old ones.
"""

from __future__ import annotations

import json
import re
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tongwen.core import artifact, console
from tongwen.core.distributed import is_main_process
from tongwen.core.errors import RecipeError, first_line
from tongwen.core.i18n import _

RUN = "run.json"
BEFORE = "before.json"  # scores of the untrained model; a run on other data computes them again
# Settings that shape the weights and the optimizer's state: a fork cannot change them. Of an adapter, only dropout may change.
SHAPE = re.compile(r"\w+\.(adapter\.(?!dropout$).*|optimizer|train|engine)")
PER_STEP = (
    "accumulation"  # in run.json unless an earlier version began the run: each step has as few micro-batches as hold it
)
PARTS = {"run": str, "settings": dict, "identity": dict, "forks": list}
PARTLY = re.compile(r"\w+\.(engine_file|adapter\.\w+)")
DATA, DTYPE = "prepare (fingerprint)", "dtype"


def check(
    folder: Path, settings: Mapping[str, Any], prepared: str, *, fork: bool, allows_new_settings: bool = True
) -> None:
    """Check an interrupted stage before it continues; record a fork. Raises RecipeError, with both values, when settings or
    data have changed and `fork` is not set, or a fork cannot change them.

    prepared: fingerprint of the data; allows_new_settings: False when the engine continues with the rates of its
    checkpoint, so that a fork is impossible.
    """
    run = _read(folder)
    if run is None:
        return
    changed = [one for one in differences(run["settings"], settings) if one[0] != "base"]  # see `enter`
    changed += _differing(run["identity"], {DATA: prepared})
    fixed = [one for one in changed if not allows_new_settings or SHAPE.fullmatch(one[0]) or _trains_other_parts(*one)]
    if fork:
        artifact.refuse_changed(str(folder), fixed, _("{hint}; --fork cannot change it").format(hint=rerun_hint()))
        _fork(folder, run, settings, changed)
    else:
        forks = _("; --fork continues with the new settings") if not fixed else ""
        artifact.refuse_changed(str(folder), changed, rerun_hint() + forks)


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """Like artifact.differences, but ignore keys of an engine file or adapter that only one side has: `engine`, `method` and
    others already show the difference, or an older version did not store them."""
    return [
        one
        for one in artifact.differences(before, now)
        if not PARTLY.fullmatch(one[0]) or _has_setting(before, one[0]) == _has_setting(now, one[0])
    ]


def _has_setting(settings: Any, name: str) -> bool:
    for key in name.split("."):
        if key not in settings:
            return False
        settings = settings[key]
    return True


def _trains_other_parts(name: str, before: Any, after: Any) -> bool:
    return name.endswith(".phases") and [one["train"] for one in before] != [one["train"] for one in after]


def _differing(known: Mapping[str, str], now: Mapping[str, str]) -> list[tuple[str, Any, Any]]:
    return [(name, known[name][:12], now[name][:12]) for name in now if known.get(name, now[name]) != now[name]]


def _fork(folder: Path, run: dict[str, Any], settings: Mapping[str, Any], changed: list[tuple[str, Any, Any]]) -> None:
    if not changed:
        return
    lines = ", ".join(f"{name}: {before!r} → {after!r}" for name, before, after in changed)
    console.notice(_("continued with different settings (--fork): {lines}").format(lines=lines))
    forks = [*run["forks"], {"from": run["run"], "at": _now(), "changed": changed}]
    identity = {name: value for name, value in run["identity"].items() if name not in (DATA, DTYPE)}
    (folder / BEFORE).unlink(missing_ok=True)
    forked = {**run, "run": _new_id(), "settings": settings, "identity": identity, "forks": forks}
    artifact.write_json(folder / RUN, forked)


def enter(folder: Path, settings: Mapping[str, Any], identity: Mapping[str, str]) -> dict[str, Any]:
    """Return the record of the run that starts or continues in this folder; the main process writes it.

    identity: fingerprints and other facts that are known only after loading the base model. Raises RecipeError when they
    differ from those at the start of the run.
    """
    run = _read(folder) or {
        "run": _new_id(),
        "began": _now(),
        "settings": settings,
        "identity": {},
        "forks": [],
        PER_STEP: "per step",
    }
    changed = _differing(run["identity"], identity)
    # A base model at another path is the same if its fingerprint is. `check` has compared the rest, except under a launcher.
    differing = differences(run["settings"], json.loads(json.dumps(settings)))
    changed += [one for one in differing if changed or one[0] != "base"]
    artifact.refuse_changed(str(folder), changed, rerun_hint())
    run |= {"settings": dict(settings), "identity": {**identity, **run["identity"]}}
    if is_main_process():
        artifact.write_json(folder / RUN, run)
    return run


def has_uniform_steps(folder: Path) -> bool:
    """Return whether the interrupted run in this folder has the same number of micro-batches in every step."""
    run = _read(folder)
    return run is not None and PER_STEP not in run


def ids(run: Mapping[str, Any]) -> set[str]:
    """Return all ids that this run has had."""
    return {run["run"], *(fork["from"] for fork in run["forks"])}


def rerun_hint() -> str:
    return _("tongwen run RECIPE --again redoes this stage and all later ones, and keeps the old folder")


def _read(folder: Path) -> dict[str, Any] | None:
    file = folder / RUN
    if not file.is_file():
        return None
    try:
        run = json.loads(file.read_text(encoding="utf-8"))
        return {**run, **{name: kind(run[name]) for name, kind in PARTS.items()}}
    except (ValueError, KeyError, TypeError) as error:
        raise RecipeError(
            _("cannot be read: {error}").format(error=first_line(error)),
            place=str(file),
            remedy=rerun_hint(),
        ) from None


def _new_id() -> str:
    return uuid.uuid4().hex[:12]


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")
