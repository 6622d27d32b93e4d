"""Resuming: which settings must stay the same and which may change, through the real command."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import byte_level_tokenizer, dialogues, manifest, tensors, tiny_moe, write_recipe, write_rows
from tests.launching import kill_at_step, run_forked
from tongwen.cli.main import main
from tongwen.core import artifact, resume
from tongwen.core.errors import TongwenError
from tongwen.core.resume import RUN
from tongwen.recipe.load import load_recipe
from tongwen.stages import sft
from tongwen.workflows import pipeline
from tongwen.workflows.stage_inputs import training_settings
from tongwen.workflows.training.phases import evaluations_of

SFT = ", save_every: 2, stop_after: 8 steps"


@pytest.fixture(scope="module")
def runs(chat_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs of one recipe: `whole`, and `broken`, which was killed after step 5 and has checkpoints 2 and 4."""
    folder = tmp_path_factory.mktemp("runs")
    for name in ("whole", "broken"):
        recipe = write_recipe(folder / name, chat_model, sft=SFT, merge=False)
        recipe.write_text(recipe.read_text().replace("{rank: 4}", "{rank: 4, dropout: 0.1}"))
    assert run_forked("run", folder / "whole" / "recipe.yaml") == 0
    assert os.WIFSIGNALED(run_forked("run", folder / "broken" / "recipe.yaml", before=kill_at_step(5)))
    return folder


@pytest.fixture()
def broken(runs: Path, tmp_path: Path) -> Path:
    """A copy of the interrupted run elsewhere, with its recipe: the folder is a new one already."""
    shutil.copytree(runs / "broken" / "out", tmp_path / "out")
    text = (runs / "broken" / "recipe.yaml").read_text()
    (tmp_path / "recipe.yaml").write_text(text.replace(f"out: {runs / 'broken'}", f"out: {tmp_path}"))
    return tmp_path


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "out" / "sft" / "metrics.jsonl").read_text().splitlines()]


def assert_same(runs: Path, folder: Path) -> None:
    wanted, found = (tensors(one / "out" / "sft") for one in (runs / "whole", folder))
    assert all(torch.equal(wanted[name], found[name]) for name in wanted)


def test_free_settings_do_not_change_the_result(runs: Path, broken: Path, chat_model: Path, tongwen: Any) -> None:
    """Also another place for the run and for its base."""
    shutil.copytree(chat_model, broken / "base")
    free = ("sft.log_every=3", "sft.save_every=3", "sft.keep_checkpoints=1", "sft.evaluate_every=3")
    code, out, _ = tongwen("run", broken / "recipe.yaml", f"base={broken / 'base'}", *free)
    assert code == 0 and "continuing after step 4 of 8" in out
    assert_same(runs, broken)
    made = manifest(broken / "out" / "sft")
    began = json.loads((runs / "broken" / "out" / "sft.partial" / RUN).read_text())
    assert (made["run"], made["forks"]) == (began["run"], [])
    code, out, _ = tongwen("run", broken / "recipe.yaml", f"base={broken / 'base'}", "sft.log_every=1")
    assert code == 0 and "sft: already done" in out


def test_smaller_micro_batch_warns_that_resume_is_not_exact(runs: Path, broken: Path, tongwen: Any) -> None:
    code, out, _ = tongwen("run", broken / "recipe.yaml", "sft.micro_batch_tokens=64", "sft.adapter.dropout=0.1")
    assert code == 0 and "micro_batch_tokens: 4096 → " in out and "no longer bit-identical" in out
    assert losses(broken)[:4] == losses(runs / "whole")[:4]


def test_padded_batches_warn_that_resume_is_not_exact(broken: Path, tongwen: Any) -> None:
    code, out, _ = tongwen("run", broken / "recipe.yaml", "sft.packing=false")
    assert code == 0 and "packed: True → False" in out and "no longer bit-identical" in out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("sft.learning_rate=1e-3", "0.01 → 0.001"),
        ("sft.patience=2 sft.evaluate_every=2", "None → 2"),
        ("sft.trainer.adam_beta2=0.9", "adam_beta2: None → 0.9"),
        ("base=OTHER", "base (fingerprint)"),
    ],
)
def test_changed_deciding_setting_is_refused_with_both_values(
    change: str, message: str, broken: Path, other_model: Path, tongwen: Any
) -> None:
    """bench/crash_storm.py has thirteen more."""
    before = (broken / "out" / "sft.partial" / RUN).read_text()
    code, _, err = tongwen("run", broken / "recipe.yaml", *change.replace("OTHER", str(other_model)).split())
    assert code == 2 and message in err and "--again" in err
    assert (broken / "out" / "sft.partial" / RUN).read_text() == before


def test_other_data_need_a_fork(broken: Path, tongwen: Any) -> None:
    recipe = broken / "recipe.yaml"
    data = write_rows(broken / "more.jsonl", dialogues(30))
    overrides = (f"prepare.dialogues={data}",)
    assert tongwen("run", recipe, *overrides, "--only", "prepare", "--again")[0] == 0
    code, _, err = tongwen("run", recipe, *overrides)
    assert code == 2 and "prepare (fingerprint)" in err and "--fork" in err
    assert tongwen("run", recipe, *overrides, "--fork")[0] == 0
    made = manifest(broken / "out" / "sft")
    assert [one["changed"][0][0] for one in made["forks"]] == ["prepare (fingerprint)"]
    assert made["run"] != made["forks"][0]["from"]


def test_settings_of_a_fork_reach_the_optimizer(broken: Path, tongwen: Any) -> None:
    overrides = ("sft.learning_rate=3e-3", "sft.schedule=constant", "sft.weight_decay=0.5", "--fork")
    code, out, _ = tongwen("run", broken / "recipe.yaml", *overrides)
    assert code == 0 and "0.01 → 0.003" in out
    lines = [json.loads(line) for line in (broken / "out" / "sft" / "metrics.jsonl").read_text().splitlines()]
    assert [line["learning_rate"] for line in lines[4:]] == [3e-3] * 4 and lines[3]["learning_rate"] != 3e-3
    state = torch.load(broken / "out" / "sft" / "checkpoints" / "checkpoint-8" / "optimizer.pt", weights_only=True)
    assert state["param_groups"][0]["weight_decay"] == 0.5


def test_fork_cannot_change_trainable_shapes(broken: Path, tongwen: Any) -> None:
    for change in ("sft.adapter.rank=8", "sft.optimizer=adafactor"):
        code, _, err = tongwen("run", broken / "recipe.yaml", change, "--fork")
        assert code == 2 and "--fork cannot change it" in err


def test_damaged_checkpoint_is_named_and_the_result_is_the_same(runs: Path, broken: Path, tongwen: Any) -> None:
    file = broken / "out" / "sft.partial" / "checkpoints" / "checkpoint-4" / "optimizer.pt"
    whole = bytearray(file.read_bytes())
    whole[len(whole) // 2] ^= 1
    file.write_bytes(whole)
    code, out, _ = tongwen("run", broken / "recipe.yaml")
    assert code == 0 and "optimizer.pt has changed" in out and "2 steps are lost" in out
    assert_same(runs, broken)


@pytest.mark.parametrize(
    "odd", ["[]", '{"run": "a1"}', '{"run": "a1", "settings": 3, "identity": {}, "forks": []}', "{"]
)
def test_unreadable_run_record_is_an_error(odd: str, broken: Path, tongwen: Any) -> None:
    (broken / "out" / "sft.partial" / RUN).write_text(odd)
    code, _, err = tongwen("run", broken / "recipe.yaml")
    assert code == 2 and RUN in err and "cannot be read" in err and "--again" in err


@pytest.mark.parametrize("odd", ["[]", "{}", "{"])
def test_unreadable_baseline_score_is_recomputed(odd: str, broken: Path, tongwen: Any) -> None:
    file = broken / "out" / "sft.partial" / resume.BEFORE
    whole = json.loads(file.read_text())
    file.write_text(odd)
    code, out, _ = tongwen("run", broken / "recipe.yaml")
    assert code == 0 and "before.json cannot be read" in out
    assert json.loads((broken / "out" / "sft" / resume.BEFORE).read_text()) == whole


def test_data_edited_after_prepare_are_refused(broken: Path, tongwen: Any) -> None:
    file = broken / "out" / "prepare" / "dialogues.jsonl"
    whole = file.read_text()
    file.write_text(whole.replace("1", "7", 1))
    code, _, err = tongwen("run", broken / "recipe.yaml")
    assert (
        code == 4
        and f"{file}: this file differs from the one that prepare wrote" in err
        and "--from prepare --again" in err
    )
    assert not list((broken / "out").glob("*.old-*")), "before anything is moved"
    file.write_text(whole)
    (file.parent / ".DS_Store").write_text("x")
    assert tongwen("run", broken / "recipe.yaml")[0] == 0, "files that prepare has not written are not compared"


def test_changed_tokens_are_encoded_again(runs: Path, broken: Path, tongwen: Any) -> None:
    file = next((broken / "out" / "tokens" / "sft").glob("*/ids.bin"))
    whole = file.read_bytes()
    file.write_bytes(whole[:20] + bytes([whole[20] ^ 1]) + whole[21:])
    code, out, _ = tongwen("run", broken / "recipe.yaml")
    assert code == 0 and "has changed since it was written: encoding it again" in out.replace("\n", " ")
    assert_same(runs, broken)


@pytest.mark.sample()
def test_two_processes_stop_on_signal_and_one_resumes(chat_model: Path, tmp_path: Path) -> None:
    """The same samples in the same order: losses to 1e-5. The signal goes to the command alone, which passes it on."""
    for name in ("whole", "broken"):
        recipe = write_recipe(tmp_path / name, chat_model, sft=", stop_after: 24 steps", merge=False)
        recipe.write_text(recipe.read_text().replace("1e-2", "1e-3"))
    assert main(["run", str(tmp_path / "whole" / "recipe.yaml")]) == 0
    recipe, out = tmp_path / "broken" / "recipe.yaml", tmp_path / "broken" / "out"
    child = os.fork()
    if not child:
        os._exit(main(["run", str(recipe), "--devices", "2"]))
    metrics = out / "sft.partial" / "metrics.jsonl"
    while not (metrics.is_file() and metrics.read_text().count("\n") > 1):
        assert os.waitpid(child, os.WNOHANG) == (0, 0)
    os.kill(child, signal.SIGTERM)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 130
    taken = metrics.read_text().count("\n")
    assert 1 < taken < 24 and (out / "sft.partial" / "checkpoints" / f"checkpoint-{taken}").is_dir()
    assert main(["run", str(recipe)]) == 0
    assert losses(tmp_path / "broken") == pytest.approx(losses(tmp_path / "whole"), abs=1e-5)


def test_engine_file_contents_are_settings(chat_model: Path, tmp_path: Path) -> None:
    """Under the same name it was taken without a word; but for how fast it goes and what it logs. Records from before it was
    kept count as the same."""
    file = tmp_path / "mine.json"
    file.write_text('{"zero_optimization": {"stage": 2}}')
    recipe = load_recipe(write_recipe(tmp_path, chat_model, sft=f", engine: {file}", merge=False))[0]
    before = training_settings(recipe, "sft")
    resume.enter(tmp_path, before, {})
    file.write_text('{"zero_optimization": {"stage": 2, "overlap_comm": true}, "steps_per_print": 5}')
    resume.check(tmp_path, training_settings(recipe, "sft"), "", fork=False)
    file.write_text('{"zero_optimization": {"stage": 3}}')
    now = training_settings(recipe, "sft")
    with pytest.raises(TongwenError, match=r"sft.engine_file.stage: 2 → 3[\s\S]*--again"):
        resume.check(tmp_path, now, "", fork=False)
    with pytest.raises(TongwenError, match="stage: 2 → 3"):
        resume.enter(tmp_path, now, {})
    finished = artifact.Artifact(tmp_path, {"settings": before, "parents": {}})
    assert pipeline._changed(recipe, "sft", finished, sft) == [("sft.engine_file.stage", 2, 3)]
    del before["sft"]["engine_file"]
    artifact.write_json(tmp_path / RUN, {"run": "x", "settings": before, "identity": {}, "forks": []})
    resume.check(tmp_path, now, "", fork=False)
    assert not pipeline._changed(recipe, "sft", finished, sft)
    assert resume.enter(tmp_path, now, {})["settings"] == now, "from here on it is kept"


def test_unused_settings_are_ignored_on_resume(chat_model: Path, tmp_path: Path) -> None:
    """An adapter's rank beside `method: full`. In an older record it may stand; a word that is read is compared."""
    recipe = load_recipe(write_recipe(tmp_path, chat_model, merge=False), ["sft.adapter={method: full, rank: 7}"])[0]
    now = training_settings(recipe, "sft")
    assert "rank" not in now["sft"]["adapter"]
    old = {**now, "sft": {**now["sft"], "adapter": {**now["sft"]["adapter"], "rank": 4}}}
    assert resume.differences(old, now) == []
    lora, other = (
        training_settings(load_recipe(write_recipe(tmp_path, chat_model), [f"sft.adapter={adapter}"])[0], "sft")
        for adapter in ("{rank: 4}", "{rank: 4, alpha: 64}")
    )
    assert resume.differences(lora, other) == [("sft.adapter.alpha", None, 64.0)]
    assert [name for name, *_ in resume.differences(lora, now)] == ["sft.adapter.method"]


def test_evaluations_of_other_data_are_ignored(tmp_path: Path) -> None:
    (tmp_path / "checkpoint.json").write_text(json.dumps({"identity": {resume.DATA: "a"}, "evaluations": [[0, 1.5]]}))
    assert evaluations_of(tmp_path, {"identity": {resume.DATA: "a"}}) == [[0, 1.5]]
    assert evaluations_of(tmp_path, {"identity": {resume.DATA: "b"}}) == []
    assert evaluations_of(None, {"identity": {resume.DATA: "b"}}) == []


def test_finished_run_can_be_moved(tmp_path: Path, chat_model: Path, tongwen: Any) -> None:
    """A stage identifies the stage below it by its fingerprint."""
    recipe = write_recipe(tmp_path, chat_model, sft=", stop_after: 1 steps", merge=False)
    rows = write_rows(tmp_path / "text.jsonl", [{"text": f"第 {number} 天，天气很好。"} for number in range(12)])
    recipe.write_text(
        recipe.read_text().replace("prepare: {", f"prepare: {{documents: {rows}, ")
        + "pretrain: {train: full, stop_after: 1 steps, batch_size: 4, samples: 0, precision: fp32}\n"
    )
    assert tongwen("run", recipe)[0] == 0
    (tmp_path / "out").rename(tmp_path / "moved")
    code, out, err = tongwen("run", recipe, f"out={tmp_path / 'moved'}")
    assert code == 0 and "sft: already done" in out, err
    file = tmp_path / "moved" / "pretrain" / "manifest.json"
    file.write_text(file.read_text().replace('"fingerprint": "', '"fingerprint": "0', 1))
    assert tongwen("run", recipe, f"out={tmp_path / 'moved'}")[0] == 2


@pytest.mark.parametrize(("engine", "passes"), [("auto", True), ("zero2", False), ("mine.json", False)])
def test_deepspeed_resumes_with_the_checkpoint_learning_rate(
    engine: str, passes: bool, chat_model: Path, tmp_path: Path, tongwen: Any
) -> None:
    """So that a fork would say one rate and take another."""
    if engine == "mine.json":
        engine = str(tmp_path / engine)
        Path(engine).write_text('{"zero_optimization": {"stage": 2}}')
    recipe = write_recipe(tmp_path, chat_model, sft=f", engine: {engine}, stop_after: 1 steps", merge=False)
    assert tongwen("run", recipe, "--only", "prepare")[0] == 0
    unfinished = tmp_path / "out" / "sft.partial"
    unfinished.mkdir()
    resume.enter(unfinished, training_settings(load_recipe(recipe)[0], "sft"), {})
    code, _, err = tongwen("run", recipe, "--fork", "sft.learning_rate=1e-3")
    if passes:
        assert code == 0 and len(manifest(tmp_path / "out" / "sft")["forks"]) == 1
    else:
        assert code == 2 and "learning_rate: 0.01 → 0.001" in err and "--fork cannot change it" in err


@pytest.mark.sample("True")
@pytest.mark.parametrize("of_old", [True, False])
def test_moe_run_resumes_with_the_targets_of_its_checkpoint(of_old: bool, tmp_path: Path, tongwen: Any) -> None:
    """0.1 chose other weights for all-linear than this version does."""
    from tongwen.model.adapters import targets

    folder = tmp_path / "model"
    tiny_moe(vocab_size=len(byte_level_tokenizer(folder))).save_pretrained(folder)
    recipe = write_recipe(tmp_path, folder, sft=", save_every: 1, stop_after: 4 steps", merge=False)

    def begin() -> None:
        if of_old:
            targets.fused_experts = lambda model: []  # type: ignore[assignment]
        kill_at_step(2)()

    assert os.WTERMSIG(run_forked("run", recipe, before=begin)) == signal.SIGKILL
    code, text, err = tongwen("run", recipe)
    assert code == 0 and "continuing after step" in text, err
    assert ("the targets with which this run began" in text) is of_old
    assert any(".experts." in name for name in tensors(tmp_path / "out" / "sft")) is not of_old
