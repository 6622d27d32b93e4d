"""bench/crash_storm.py in small: no failure in tongwen, failures in a plain Trainer."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest
from bench.crash_storm import CHANGES, RUNS, Sandbox, changed_recipes, every_call, flipped_bits, plain_trainer, storm


@pytest.fixture(scope="module")
def sandbox(tmp_path_factory: pytest.TempPathFactory) -> Sandbox:
    return Sandbox(tmp_path_factory.mktemp("sandbox"))


@pytest.mark.sample()
@pytest.mark.parametrize("method", RUNS)
def test_killed_training_resumes_to_the_same_result(method: str, sandbox: Sandbox) -> None:
    kills = 5 if method in ("full", "lora") else 1
    found = storm(sandbox, method, kills, random.Random(method))
    assert found["kills"] >= kills and found["inside_a_commit"] >= 1
    assert (found["diverged"], found["hand_repairs"]) == (0, 0)


def test_thirteen_changed_recipes_are_refused(sandbox: Sandbox) -> None:
    assert len(CHANGES) == 13 and changed_recipes(sandbox) == {"changes": 13, "refused": 13, "accepted": []}


def test_flipped_bits_are_found(sandbox: Sandbox) -> None:
    found = flipped_bits(sandbox, 40, random.Random(0))
    assert found == {"flips": 40, "detected": 40}


@pytest.mark.sample()
@pytest.mark.skipif(not shutil.which("strace"), reason="strace is not installed")
def test_first_system_calls_of_a_save_survive_kill_and_failure(sandbox: Sandbox) -> None:
    found = every_call(sandbox, "lora", slice(2))
    assert found["calls"] > 40, "what a save does in all"
    assert found["killed_exact"] == found["failed_exact"] == found["killed"] == found["failed"] == 2


def test_plain_trainer_fails_the_crash_storm(sandbox: Sandbox) -> None:
    found = plain_trainer(sandbox, 2, random.Random(0))
    assert found["hand_repairs"] + found["diverged"] > 0


def test_committed_result_has_no_failures() -> None:
    found = json.loads((Path(__file__).parents[2] / "bench" / "results" / "crash_storm.json").read_text())
    for method in RUNS:
        one, least = found[method], 200 if method in ("full", "lora") else 50
        assert one["kills"] >= least and 4 * one["inside_a_commit"] >= least
        assert one["diverged"] == one["hand_repairs"] == 0
    assert found["flipped_bits"]["flips"] == found["flipped_bits"]["detected"] == 400
    whole, changed, plain = (found[name] for name in ("command_line", "changed_recipes", "plain_trainer"))
    assert whole["kills"] >= 10 and whole["diverged"] == whole["hand_repairs"] == 0
    assert changed["changes"] == changed["refused"] == 13
    assert plain["hand_repairs"] > 0, "else the harness is blind"
    for calls in (found["system_calls"], found["system_calls_full"]):
        assert calls["killed"] == calls["killed_exact"] > 0 and calls["failed"] == calls["failed_exact"] > 0
