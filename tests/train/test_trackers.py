"""Trackers get the same numbers as metrics.jsonl, a resumed run continues its own curve, and samples are kept."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import TrainerCallback
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from tests.conftest import write_recipe
from tests.launching import run_forked
from tongwen.core.errors import MachineError, MissingPackage
from tongwen.train import trackers
from tongwen.train.trackers import TrackerRun
from tongwen.train.trainer import PlannedTrainer

accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
SETTINGS = ", stop_after: 6 steps, evaluate_every: 2, save_every: 2"


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def die() -> None:
    original = PlannedTrainer.training_step

    def step_or_kill(self: Any, *arguments: Any, **options: Any) -> Any:
        if self.state.global_step == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(self, *arguments, **options)

    PlannedTrainer.training_step = step_or_kill  # type: ignore[method-assign]


@pytest.mark.sample()
def test_resumed_run_logs_one_curve_without_duplicates(chat_model: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, chat_model, sft=SETTINGS, merge=False, extra="track: tensorboard\n", samples=1)
    assert os.WTERMSIG(run_forked("run", recipe, before=die)) == signal.SIGKILL
    assert run_forked("run", recipe) == 0
    stage = tmp_path / "out" / "sft"
    curves = accumulator.EventAccumulator(str(stage / "tensorboard")).Reload()
    logged, written = curves.Scalars("train/loss"), lines(stage / "metrics.jsonl")
    assert [(one.step, round(one.value, 4)) for one in logged] == [
        (line["step"], round(line["loss"], 4)) for line in written
    ]
    scores = [(line["step"], line["bits_per_byte"]) for line in written if "bits_per_byte" in line]
    assert [one.step for one in curves.Scalars("eval/bits_per_byte")] == [step for step, _ in scores] == [2, 4, 6]
    assert curves.Scalars("eval/bits_per_byte")[-1].value == pytest.approx(scores[-1][1], rel=1e-5)
    samples = lines(stage / "samples.jsonl")
    assert [line["step"] for line in samples] == [2, 4, 6]
    report = json.loads((stage / "report.json").read_text())
    assert report["samples"][0]["on_the_way"] == {str(line["step"]): line["answer"] for line in samples}
    assert report["samples"][0]["after"] == samples[-1]["answer"]
    assert "step 4" in (stage / "report.html").read_text(encoding="utf-8")


def test_missing_tracker_is_reported_before_the_first_stage(
    chat_model: Path, tmp_path: Path, tongwen: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    nothing = SimpleNamespace(util=SimpleNamespace(find_spec=lambda name: None))
    monkeypatch.setattr(trackers, "importlib", nothing)  # not importlib itself: others ask it too, and keep the answer
    with pytest.raises(MissingPackage, match="swanlab"):
        trackers.check(["swanlab"])
    recipe = write_recipe(tmp_path, chat_model, merge=False, extra="track: [swanlab, wandb]\n")
    code, _, err = tongwen("run", recipe)
    assert code == 5 and "'swanlab'" in err and "pip install 'tongwen[swanlab]'" in err
    assert not (tmp_path / "out" / "prepare").exists()
    code, _, err = tongwen("check", recipe)
    assert code == 5 and "'swanlab'" in err
    code, _, err = tongwen("check", recipe, "sft.trainer={report_to: wandb}")
    assert code == 2 and "track" in err


@pytest.fixture()
def nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Simulate a machine with all trackers installed and no login. Returns its home folder."""
    monkeypatch.setattr(trackers, "importlib", SimpleNamespace(util=SimpleNamespace(find_spec=lambda name: name)))
    for name in list(os.environ):
        if name.startswith(("WANDB_", "SWANLAB_", "MLFLOW_", "NETRC")) or name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("name", "variable", "file", "text"),
    [
        ("wandb", "WANDB_API_KEY", ".netrc", "machine api.wandb.ai login user password x"),
        ("wandb", "WANDB_BASE_URL", "wandb/settings", "[default]\nmode = offline"),
        ("swanlab", "SWANLAB_API_KEY", ".swanlab/.netrc", "machine api.swanlab.cn login user password x"),
    ],
)
def test_missing_key_is_reported_first(
    name: Any, variable: str, file: str, text: str, nowhere: Path, chat_model: Path, tongwen: Any, monkeypatch: Any
) -> None:
    recipe = write_recipe(nowhere, chat_model, merge=False, extra=f"track: {name}\n")
    for command in ("check", "run"):
        code, _, err = tongwen(command, recipe)
        assert code == 5 and f"track: {name}: no key is set for it" in err and f"{name.upper()}_MODE=offline" in err
    assert not (nowhere / "out" / "prepare").exists()
    with monkeypatch.context() as patch:
        patch.setenv(variable, "x")
        trackers.check([name])
    with monkeypatch.context() as patch:
        patch.setenv(f"{name.upper()}_MODE", "offline")
        trackers.check([name])
        patch.setenv(f"{name.upper()}_MODE", "online")
        with pytest.raises(MachineError):
            trackers.check([name])
    (nowhere / file).parent.mkdir(exist_ok=True)
    (nowhere / file).write_text("machine github.com login user password x" if file == ".netrc" else "[default]\n")
    with pytest.raises(MachineError):
        trackers.check([name])
    (nowhere / file).write_text(text)
    trackers.check([name])


def test_unreachable_server_is_reported_first(nowhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trackers.check(["mlflow"])
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://me:secret@127.0.0.1:{listener.getsockname()[1]}")
        with pytest.raises(MachineError, match=r"track: mlflow: http://127\.0\.0\.1 does not answer"):
            trackers.check(["mlflow"])
        listener.listen()
        trackers.check(["mlflow"])
    for address in ("http://[::1", "http://", "https://:5000"):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
        with pytest.raises(MachineError, match="does not answer"):
            trackers.check(["mlflow"])


class Failing(TrainerCallback):
    """A tracker that fails at one event."""

    at = ""

    def on_train_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        self.fail("on_train_begin")

    def on_log(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        self.fail("on_log")

    def fail(self, event: str) -> None:
        if event == self.at:
            raise OSError("the key is wrong\nand more")


@pytest.mark.parametrize("at", ["on_train_begin", "on_log"])
def test_failing_tracker_logs_one_line(
    at: str, chat_model: Path, tmp_path: Path, tongwen: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A failing tracker ends a run at its start, but never a training in progress."""
    monkeypatch.setattr(trackers, "check", lambda names: None)
    monkeypatch.setattr(Failing, "at", at)
    monkeypatch.setitem(INTEGRATION_TO_CALLBACK, "trackio", Failing)
    recipe = write_recipe(tmp_path, chat_model, sft=", stop_after: 3 steps", merge=False, extra="track: trackio\n")
    code, out, err = tongwen("run", recipe)
    if at == "on_train_begin":
        assert (
            code == 5
            and err.strip() == "✗ track: trackio: it cannot start: the key is wrong\n  → remove it from `track`"
        )
    else:
        assert code == 0 and out.count("trackio failed: the key is wrong; training continues without it") == 1
        assert len(lines(tmp_path / "out" / "sft" / "metrics.jsonl")) == 3


def test_later_phase_starts_without_a_failing_tracker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Failing, "at", "on_train_begin")
    monkeypatch.setitem(INTEGRATION_TO_CALLBACK, "trackio", Failing)
    callback = trackers.TrackerCallback(TrackerRun(["trackio"], "zh", "0", tmp_path, required=False), 0)
    for _ in range(2):
        callback.on_train_begin(None, None, None)
    assert capsys.readouterr().out.count("trackio failed") == 1


def test_resumed_run_keeps_its_mlflow_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_RUN_ID", raising=False)
    monkeypatch.setitem(INTEGRATION_TO_CALLBACK, "mlflow", Failing)
    run = SimpleNamespace(info=SimpleNamespace(run_id="aa75"))
    monkeypatch.setitem(sys.modules, "mlflow", SimpleNamespace(active_run=lambda: run))
    one = TrackerRun(["mlflow"], "zh-sft", "0", tmp_path)
    for known in (None, "aa75"):
        with one.environment():
            assert os.environ.pop("MLFLOW_RUN_ID", None) == known  # it takes it away itself
            trackers.TrackerCallback(one, 0).on_train_begin(None, None, None)
    (tmp_path / trackers.IDS).write_text("{")
    assert one._ids() == {}, "and it is another run there"
    with TrackerRun(["mlflow"], "zh-sft-phase-2", "0", tmp_path).environment():
        assert "MLFLOW_RUN_ID" not in os.environ


def test_trackers_are_transformers_integrations_with_stable_ids(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_RUN_ID", "mine")
    monkeypatch.delenv("SWANLAB_RUN_ID", raising=False)
    one = TrackerRun(["wandb", "swanlab", "mlflow", "trackio"], "zh-sft", "0123456789abcdef", tmp_path)
    assert set(one.names) <= set(INTEGRATION_TO_CALLBACK) and one.arguments["report_to"] == "none"
    seen = []
    for _ in range(2):
        with one.environment():
            assert os.environ["WANDB_RUN_ID"] == "mine" and os.environ["SWANLAB_RESUME"] == "allow"
            seen.append(os.environ["SWANLAB_RUN_ID"])
        assert "SWANLAB_RUN_ID" not in os.environ
    assert seen[0] == seen[1] and len(seen[0]) == 21
    assert one.arguments["run_name"] == "zh-sft-01234567"
