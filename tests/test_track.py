"""Other programs get the same numbers as metrics.jsonl, a resumed run goes on in its own curve, and samples are kept."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.conftest import write_recipe
from tests.launching import in_a_child
from tongwen.errors import MissingPackage
from tongwen.train import track
from tongwen.train.fit import PlannedTrainer
from tongwen.train.track import Track

accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
WORDS = ", stop_after: 6 steps, evaluate_every: 2, save_every: 2"


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def die() -> None:
    original = PlannedTrainer.training_step

    def step_or_die(self: Any, *arguments: Any, **options: Any) -> Any:
        if self.state.global_step == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(self, *arguments, **options)

    PlannedTrainer.training_step = step_or_die  # type: ignore[method-assign]


def test_a_killed_run_is_one_curve_and_its_samples_stand_once(chat_model: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, chat_model, sft=WORDS, merge=False, extra="track: tensorboard\n")
    assert os.WTERMSIG(in_a_child("run", recipe, before=die)) == signal.SIGKILL
    assert in_a_child("run", recipe) == 0
    stage = tmp_path / "out" / "sft"
    curves = accumulator.EventAccumulator(str(stage / "tensorboard")).Reload()
    told, written = curves.Scalars("train/loss"), lines(stage / "metrics.jsonl")
    assert [(one.step, round(one.value, 4)) for one in told] == [
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


def test_a_program_that_is_not_there_is_said_before_the_base_is_opened(
    chat_model: Path, tmp_path: Path, tongwen: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    nothing = SimpleNamespace(util=SimpleNamespace(find_spec=lambda name: None))
    monkeypatch.setattr(track, "importlib", nothing)  # not importlib itself: others ask it too, and keep the answer
    with pytest.raises(MissingPackage, match="swanlab"):
        track.check(["swanlab"])
    recipe = write_recipe(tmp_path, chat_model, merge=False, extra="track: [swanlab, wandb]\n")
    code, _, err = tongwen("run", recipe)
    assert code == 5 and "'swanlab'" in err and "pip install 'tongwen[swanlab]'" in err
    assert not (tmp_path / "out" / "sft.partial").exists()
    code, _, err = tongwen("check", recipe, "sft.trainer={report_to: wandb}")
    assert code == 2 and "track" in err


def test_every_program_is_transformers_own_and_is_told_the_same_run_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    monkeypatch.setenv("WANDB_RUN_ID", "mine")
    monkeypatch.delenv("SWANLAB_RUN_ID", raising=False)
    one = Track(["wandb", "swanlab", "mlflow", "trackio"], "zh-sft", "0123456789abcdef", tmp_path)
    assert set(one.arguments["report_to"]) <= set(INTEGRATION_TO_CALLBACK)
    seen = []
    for _ in range(2):
        with one.told():
            assert os.environ["WANDB_RUN_ID"] == "mine" and os.environ["SWANLAB_RESUME"] == "allow"
            seen.append(os.environ["SWANLAB_RUN_ID"])
        assert "SWANLAB_RUN_ID" not in os.environ
    assert seen[0] == seen[1] and len(seen[0]) == 21
    assert one.arguments["run_name"] == "zh-sft-01234567"
