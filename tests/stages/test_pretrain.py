"""Continued pre-training: only trained weights change, no data are lost, and forgetting is detected."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import dialogues, manifest, remade, tensors, write_rows
from tests.launching import kill_at_step, needs_deepspeed, run_forked, run_ranks
from tongwen.cli.main import main
from tongwen.model.loading.fingerprint import fingerprint_chain, fingerprint_model
from tongwen.model.loading.model_ref import ModelRef
from tongwen.train.trainer import PhaseRun, train_phase

NEW = [300, 301, 470, 471]
EMBEDDING = "model.embed_tokens.weight"


def documents(count: int) -> list[dict[str, str]]:
    """Chinese and English texts of different lengths; every fourth is English."""
    return [
        {"text": f"The quick brown fox number {number} jumps over the lazy dog. " * (1 + number % 3)}
        if number % 4 == 0
        else {"text": f"第{number}天，月亮自己不会发光，它反射太阳的光。" * (1 + number % 4)}
        for number in range(count)
    ]


def write_recipe(
    folder: Path,
    base: Path,
    settings: str,
    *,
    rows: int = 40,
    extra: str = "",
    shape: str = "adapter: {rank: 4}, ",
    samples: int = 0,
) -> Path:
    """A tiny run of pretrain."""
    data = write_rows(folder / "docs.jsonl", documents(rows))
    recipe = folder / "recipe.yaml"
    recipe.write_text(
        f"name: tiny\nbase: {base}\nout: {folder / 'out'}\n"
        f"prepare: {{documents: {data}, held_out: 8, dedup: {{documents: 'off'}}}}\n"
        f"pretrain: {{{shape}{'' if ' learning_rate' in settings.split('phases')[0] else 'learning_rate: 1e-2, '}max_length: 64, batch_size: 4, samples: {samples}, precision: fp32, {settings}}}\n"
        + extra,
        encoding="utf-8",
    )
    return recipe


@pytest.fixture(scope="session")
def grown(chat_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base with four rows, as if its vocabulary stage had added them."""
    folder = tmp_path_factory.mktemp("grown")
    shutil.copytree(chat_model, folder, dirs_exist_ok=True)
    (folder / "new_rows.json").write_text(json.dumps(NEW))
    return folder


def metrics(stage: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (stage / "metrics.jsonl").read_text().splitlines()]


def changed_rows(before: torch.Tensor, after: torch.Tensor) -> list[int]:
    return torch.nonzero((before != after).any(dim=1)).flatten().tolist()


@pytest.mark.parametrize(
    ("phases", "stored", "precision"),
    [
        ("[{train: new_rows}]", torch.float32, "fp32"),
        ("[{train: new_rows}]", torch.float32, "bf16"),
        ("[{train: new_rows}]", torch.float16, "bf16"),
        ("[{train: new_rows}, {train: embeddings, stop_after: 1 steps}]", torch.float32, "fp32"),
    ],
)
def test_only_new_rows_change(
    phases: str, stored: torch.dtype, precision: str, grown: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Alone the rows are tensors of their own; before a phase that trains all rows they are one matrix under a guard.
    Neither weight decay nor Adam's memory may move another row."""
    monkeypatch.setattr("tongwen.model.loading.devices.cpu_has_bf16", lambda: True)
    settings = f"phases: {phases}, stop_after: 6 steps, weight_decay: 0.5, save_every: 6, max_grad_norm: 0.1"
    rough = {name: (part + 1e-4).to(stored) for name, part in tensors(grown).items()}  # of which bf16 would lose a part
    base = remade(grown, tmp_path / "base", rough, dtype=str(stored).removeprefix("torch."))
    recipe = write_recipe(tmp_path, base, settings)
    recipe.write_text(recipe.read_text().replace("precision: fp32", f"precision: {precision}"))
    assert main(["run", str(recipe)]) == 0
    stage = tmp_path / "out" / "pretrain"
    if "embeddings" in phases:
        stage = stage / "checkpoints" / "phase-1" / "checkpoint-6"
    before, after = tensors(base), tensors(stage)
    assert set(before) == set(after), "tied stays tied: there is no second matrix"
    assert {name for name in before if not torch.equal(before[name], after[name])} == {EMBEDDING}
    assert changed_rows(before[EMBEDDING], after[EMBEDDING]) == NEW


def test_new_rows_are_kept_with_an_adapter(grown: Path, tmp_path: Path) -> None:
    """Trained in the first phase, at rest in the second, and both in what is merged."""
    settings = "phases: [{train: new_rows, stop_after: 3 steps}, {train: lora, stop_after: 3 steps}], save_every: 3"
    assert main(["run", str(write_recipe(tmp_path, grown, settings, extra="merge: {}\n"))]) == 0
    before, after = tensors(grown), tensors(tmp_path / "out" / "merge")
    assert changed_rows(before[EMBEDDING], after[EMBEDDING]) == NEW
    assert {name for name in before if not torch.equal(before[name], after[name])} == {
        name for name in before if "_proj" in name or name == EMBEDDING
    }
    phases = (tensors(tmp_path / f"out/pretrain/checkpoints/phase-{number}/checkpoint-3") for number in (1, 2))
    rows, later = ([part for name, part in state.items() if "trainable_tokens" in name] for state in phases)
    assert len(rows) >= 1 and all(torch.equal(one, other) for one, other in zip(rows, later, strict=True))


def test_new_rows_need_a_vocabulary_stage(chat_model: Path, tmp_path: Path, tongwen: Any) -> None:
    code, _, err = tongwen("run", write_recipe(tmp_path, chat_model, "train: new_rows"))
    assert code == 4 and "new_rows.json" in err and "train: embeddings" in err


def test_phased_run_saves_an_adapter_that_chats_and_merges(grown: Path, tmp_path: Path, tongwen: Any) -> None:
    settings = "phases: [{train: new_rows, stop_after: 3 steps}, {train: lora+embeddings, stop_after: 1 epoch}], evaluate_every: 2"
    recipe = write_recipe(tmp_path, grown, settings, extra="merge: {}\n")
    assert tongwen("run", recipe)[0] == 0
    stage = tmp_path / "out" / "pretrain"
    report, made = json.loads((stage / "report.json").read_text()), manifest(stage)
    assert made["method"] == "new_rows → lora+embeddings"
    lines = metrics(stage)
    assert [line["step"] for line in lines] == list(range(1, made["steps"] + 1))
    assert [line["tokens"] for line in lines] == sorted({line["tokens"] for line in lines})
    groups = report["held_out"]["groups"]
    assert set(groups) == {"zh", "other"}
    assert groups["zh"]["bits_per_byte"]["after"] < groups["zh"]["bits_per_byte"]["before"]
    size = sum(group["bytes"] for group in groups.values())
    whole = sum(group["bytes"] * group["bits_per_byte"]["after"] for group in groups.values()) / size
    assert whole == pytest.approx(report["held_out"]["bits_per_byte"]["after"])
    assert [line["step"] for line in lines if "bits_per_byte_zh" in line] == [2, 3, 5, 7, 9, 11]
    assert report["mask"]["roles"] == {
        "text": {"tokens": report["mask"]["tokens"], "learned": report["mask"]["learned_tokens"]}
    }
    assert report["ledger"]["prepare"]["kept"]["rows"] == report["ledger"]["encode"]["in"]["rows"] == 40
    base, merged = tensors(grown), tensors(tmp_path / "out" / "merge")
    assert set(base) == set(merged), "tied stays tied"
    assert {name for name in base if not torch.equal(base[name], merged[name])} == {
        name for name in base if "_proj" in name or name == EMBEDDING
    }
    code, out, _ = tongwen("run", recipe)
    assert (code, out.count("already done")) == (0, 3)
    code, out, _ = tongwen("show", tmp_path / "out" / "merge")
    assert code == 0 and "new_rows → lora+embeddings" in out
    import tongwen as package

    live = package.open(str(stage), template="completion").generate(["月亮"], max_new_tokens=8)
    folded = package.open(str(tmp_path / "out" / "merge"), template="completion").generate(["月亮"], max_new_tokens=8)
    assert live == folded


def test_sft_continues_from_a_pretrained_adapter(grown: Path, tmp_path: Path, tongwen: Any) -> None:
    """The change of the first adapter is in the weights that the second one is trained on, and the chain is recorded."""
    data = write_rows(tmp_path / "talk.jsonl", dialogues(12))
    recipe = write_recipe(
        tmp_path,
        grown,
        "train: lora+embeddings, stop_after: 6 steps",
        extra="sft: {template: chatml, adapter: {rank: 2}, max_length: 256, stop_after: 1 steps, precision: fp32}\n",
    )
    recipe.write_text(recipe.read_text().replace("prepare: {", f"prepare: {{dialogues: {data}, "))
    assert tongwen("run", recipe)[0] == 0
    out = tmp_path / "out"
    pretrained, tuned = manifest(out / "pretrain"), manifest(out / "sft")
    below = fingerprint_model(ModelRef("", str(grown)))
    assert below is not None
    assert tuned["parents"]["base"]["path"] == str(out / "pretrain")
    assert tuned["parents"]["base"]["fingerprint"] == fingerprint_chain(below, pretrained["fingerprint"])
    from tongwen.model.adapters.chain import open_adapter_chain
    from tongwen.model.loading.locate import locate

    place = locate(str(out / "sft"))
    assert place.adapters == (str(out / "pretrain"), str(out / "sft"))
    model, _ = open_adapter_chain(place, torch.float32)
    found, base = model.state_dict()[EMBEDDING], tensors(grown)[EMBEDDING]
    assert not torch.equal(found, base), "what pretrain taught the embeddings is there"
    code, out_text, _ = tongwen("run", recipe)
    assert code == 0 and out_text.count("already done") == 3


def test_killed_run_resumes_across_a_phase_boundary(grown: Path, tmp_path: Path) -> None:
    settings = (
        "phases: [{train: new_rows, stop_after: 5 steps, learning_rate: 5e-3}, {train: lora+embeddings, stop_after: 6 steps}],"
        " save_every: 2, neftune: 5, evaluate_every: 3"
    )
    shape = "adapter: {rank: 4, dropout: 0.1}, "
    for name in ("whole", "broken"):
        write_recipe(tmp_path / name, grown, settings, shape=shape)
    assert run_forked("run", tmp_path / "whole" / "recipe.yaml") == 0
    broken = tmp_path / "broken" / "recipe.yaml"
    for step, phase in ((3, 1), (0, 2), (1, 2), (5, 2)):
        assert os.WTERMSIG(run_forked("run", broken, before=kill_at_step(step, phase))) == signal.SIGKILL
    assert run_forked("run", broken) == 0
    stages = [tmp_path / name / "out" / "pretrain" for name in ("whole", "broken")]
    wanted, found = map(tensors, stages)
    assert set(wanted) == set(found)
    assert all(torch.equal(wanted[name], found[name]) for name in wanted)
    keys = ("step", "epoch", "loss", "grad_norm", "tokens", "bits_per_byte")
    lines = [[{key: line.get(key) for key in keys} for line in metrics(stage)] for stage in stages]
    assert lines[0] == lines[1] and len(lines[0]) == 11


@pytest.mark.sample()
def test_embeddings_use_their_own_learning_rate(grown: Path, tmp_path: Path) -> None:
    moved = {}
    for rate in ("1e-2", "1e-4"):
        settings = f"train: lora+embeddings, embedding_learning_rate: {rate}, stop_after: 1 steps, warmup: 0, schedule: constant"
        assert main(["run", str(write_recipe(tmp_path / rate, grown, settings))]) == 0
        assert (
            main(
                [
                    "merge",
                    "--base",
                    str(grown),
                    "--adapter",
                    str(tmp_path / rate / "out/pretrain"),
                    "--out",
                    str(tmp_path / rate / "m"),
                ]
            )
            == 0
        )
        merged, base = tensors(tmp_path / rate / "m"), tensors(grown)
        moved[rate] = {name: float((merged[name] - base[name]).abs().max()) for name in base}
        line = metrics(tmp_path / rate / "out" / "pretrain")[0]
        assert (line["learning_rate"], line.get("embedding_learning_rate", 1e-2)) == (1e-2, float(rate))
    settings = "train: lora+embeddings, embedding_learning_rate: 1e-3, stop_after: 5 steps, warmup: 1, schedule: cosine"
    assert main(["run", str(write_recipe(tmp_path / "many", grown, settings))]) == 0
    for line in metrics(tmp_path / "many" / "out" / "pretrain")[1:]:
        assert line["embedding_learning_rate"] == pytest.approx(line["learning_rate"] / 10)
    # Adam's first step is as long as its learning rate.
    assert moved["1e-2"][EMBEDDING] == pytest.approx(1e-2, rel=1e-2)
    assert moved["1e-4"][EMBEDDING] == pytest.approx(1e-4, rel=1e-2)
    other = "model.layers.0.mlp.up_proj.weight"
    assert moved["1e-2"][other] == pytest.approx(moved["1e-4"][other], rel=1e-3)


def test_forgetting_warns_and_stops(grown: Path, tmp_path: Path, tongwen: Any) -> None:
    """Learning nothing but Chinese with far too high a rate makes English worse."""
    settings = "train: full, learning_rate: 0.3, warmup: 0, evaluate_every: 1, stop_after: 20 steps"
    recipe = write_recipe(tmp_path, grown, settings + ", forgetting: {warn: 0.01, stop: 0.02}")
    code, _, err = tongwen("run", recipe)
    assert code == 6 and "forgetting.stop: 0.02" in err and "bits per byte of" in err and "rose from" in err
    code, out, err = tongwen("run", recipe, "pretrain.forgetting.stop=null", "pretrain.stop_after=2 steps", "--fork")
    assert code == 0 and "rose from" in out + err


def test_forgetting_is_checked_at_the_end_of_a_phase(grown: Path, tmp_path: Path, tongwen: Any) -> None:
    """Also in a phase that is shorter than `evaluate_every`; at the end of all it is too late to stop, and said."""
    first = "{train: embeddings, learning_rate: 5, stop_after: 3 steps}"
    settings = "warmup: 0, evaluate_every: 100, forgetting: {warn: null, stop: 0.02}"
    recipe = write_recipe(
        tmp_path, grown, f"phases: [{first}, {{train: lora+embeddings, stop_after: 9 steps}}], {settings}"
    )
    code, _, err = tongwen("run", recipe)
    assert code == 6 and "forgetting.stop: 0.02" in err
    assert [line["step"] for line in metrics(tmp_path / "out" / "pretrain.partial")][-1] == 2, (
        "of 3, and no phase after"
    )
    recipe = write_recipe(tmp_path / "one", grown, f"phases: [{first}], {settings}")
    code, out, err = tongwen("run", recipe)
    assert code == 0 and "rose from" in out + err
    assert "! held-out bits per byte" in out + err, "what has risen is not good"


@pytest.mark.sample()
def test_learning_rate_below_its_peak_is_reported(grown: Path, tmp_path: Path, tongwen: Any) -> None:
    recipe = write_recipe(tmp_path, grown, "train: lora, stop_after: 2 steps")
    for overrides, message in (
        (["pretrain.warmup=100"], "warmup: 100 takes 100 steps, but there are only 2"),
        (["pretrain.schedule=wsd", "pretrain.warmup=0", "pretrain.decay=30"], "warmup and decay take 0 + 30 steps"),
        (["pretrain.warmup=1"], ""),
    ):
        code, out, err = tongwen("run", recipe, *overrides, "--again")
        assert code == 0 and ("never reaches its peak" in out + err) == bool(message) and message in out + err


def test_pretraining_an_instruct_model_warns(chat_model: Path, tmp_path: Path, tongwen: Any) -> None:
    import shutil

    from transformers import AutoTokenizer

    base = tmp_path / "some-Instruct"
    shutil.copytree(chat_model, base)
    code, out, _ = tongwen("run", write_recipe(tmp_path / "a", base, "stop_after: 1 steps"))
    assert code == 0 and "--chat-vector" in out
    shutil.copytree(chat_model, tmp_path / "plain")
    code, out, _ = tongwen("run", write_recipe(tmp_path / "b", tmp_path / "plain", "stop_after: 1 steps"))
    assert code == 0 and "--chat-vector" not in out
    assert AutoTokenizer.from_pretrained(tmp_path / "a" / "out" / "pretrain").chat_template is None


@pytest.mark.parametrize("method", ["embeddings", "full"])
def test_training_without_adapter_saves_a_full_model(method: str, grown: Path, tmp_path: Path) -> None:
    assert (
        main(["run", str(write_recipe(tmp_path, grown, f"train: {method}, stop_after: 2 steps, learning_rate: 1e-3"))])
        == 0
    )
    before, after = tensors(grown), tensors(tmp_path / "out" / "pretrain")
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == ({EMBEDDING} if method == "embeddings" else set(before))


def test_plan_check_and_look_support_pretraining(grown: Path, tmp_path: Path, tongwen: Any) -> None:
    settings = "phases: [{train: new_rows, stop_after: 3 steps}, {train: lora+embeddings, stop_after: 1 epoch}]"
    recipe = write_recipe(tmp_path, grown, settings)
    code, out, _ = tongwen("plan", recipe, "--json")
    plan = json.loads(out)
    assert code == 0 and plan["steps_of_phases"][0] == 3 and plan["stages"]["pretrain"]["steps"] == plan["steps"]
    assert tongwen("check", recipe)[0] == 0
    code, out, _ = tongwen("look", recipe, "-n", "1")
    assert code == 0 and "<|endoftext|>" in out


@pytest.mark.sample("concatenated")
@pytest.mark.parametrize("arrangement", ["apart", "concatenated", "blocks"])
def test_result_is_independent_of_the_batch_partition(arrangement: str, chat_model: Path, tmp_path: Path) -> None:
    """Many small micro-batches, one pack of all, and two processes: the same losses and gradients."""
    found = []
    for budget, devices in ((64, 1), (4096, 1), (4096, 2)):
        settings = f"documents: {arrangement}, stop_after: 3 steps, learning_rate: 1e-3, micro_batch_tokens: {budget}"
        recipe = write_recipe(tmp_path / f"{budget}-{devices}", chat_model, settings)
        if devices == 2 and arrangement != "apart":
            continue
        assert main(["run", str(recipe), "--devices", str(devices)]) == 0
        found.append([(line["loss"], line["grad_norm"]) for line in metrics(recipe.parent / "out" / "pretrain")])
    for lines in found[1:]:
        for (loss, norm), (wanted_loss, wanted_norm) in zip(lines, found[0], strict=True):
            assert loss == pytest.approx(wanted_loss, abs=2e-6)
            assert norm == pytest.approx(wanted_norm, rel=2e-5)


@pytest.mark.sample()
@pytest.mark.parametrize(
    ("engine", "first", "then", "tied"),
    [
        ("ddp", "new_rows", "lora+embeddings", True),
        ("fsdp2", "new_rows", "lora+embeddings", True),  # rows under a guard
        ("fsdp2", "new_rows", "lora", True),  # rows beside an adapter, at rest in the second phase
        ("fsdp2", "lora+embeddings", "lora", False),  # so are embeddings
        ("fsdp2", "new_rows", "", True),  # rows alone
        pytest.param("zero2", "new_rows", "", True, marks=needs_deepspeed),
    ],
)
def test_two_killed_processes_match_the_phases_of_one(
    engine: str, first: str, then: str, tied: bool, grown: Path, tmp_path: Path
) -> None:
    untied = {"lm_head.weight": 1.1 * tensors(grown)[EMBEDDING]}
    base = grown if tied else remade(grown, tmp_path / "base", untied, tie_word_embeddings=False)
    second = f", {{train: {then}, stop_after: 4 steps}}" if then else ""
    settings = (
        f"phases: [{{train: {first}, stop_after: {2 if then else 6} steps, learning_rate: 5e-3}}{second}],"
        " save_every: 1, evaluate_every: 2, weight_decay: 0.5"
    )
    assert run_forked("run", write_recipe(tmp_path / "one", base, settings)) == 0
    recipe = write_recipe(tmp_path / "two", base, f"{settings}, engine: {engine}")

    def die(rank: int) -> None:
        if rank == 1:
            kill_at_step(*((2, 2) if then else (4, 0)))()

    assert run_ranks(2, "run", recipe, before=die)[1] == -signal.SIGKILL
    partial = tmp_path / "two" / "out" / "pretrain.partial" / "checkpoints"
    assert {folder.name for folder in partial.iterdir()} >= ({"phase-1", "phase-2"} if then else {"checkpoint-3"})
    assert run_ranks(2, "run", recipe) == [0, 0]
    wanted, found = (tensors(tmp_path / name / "out" / "pretrain") for name in ("one", "two"))
    assert set(wanted) == set(found)
    for name, part in wanted.items():
        assert torch.allclose(found[name], part, atol=1e-4), name
    if not then:
        before = tensors(base)
        assert changed_rows(before[EMBEDDING], found[EMBEDDING]) == NEW
        assert all(torch.equal(part, found[name]) for name, part in before.items() if name != EMBEDDING)


def test_source_language_and_share_are_used(chat_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = list[PhaseRun]()
    monkeypatch.setattr(
        "tongwen.workflows.training.job.train_phase", lambda job: (jobs.append(job), train_phase(job))[1]
    )
    write_rows(tmp_path / "more.jsonl", [{"text": f"hello world, how are you today? {number}"} for number in range(60)])
    recipe = write_recipe(tmp_path, chat_model, "stop_after: 1 epoch")
    text = recipe.read_text().replace(
        f"documents: {tmp_path / 'docs.jsonl'}",
        f"documents: [{tmp_path / 'docs.jsonl'}, {{path: {tmp_path / 'more.jsonl'}, language: en, share: 0.2}}]",
    )
    recipe.write_text(text)
    assert main(["run", str(recipe)]) == 0
    report = json.loads((tmp_path / "out" / "pretrain" / "report.json").read_text())
    assert set(report["held_out"]["groups"]) == {"en", "other", "zh"}
    lines = metrics(tmp_path / "out" / "pretrain")
    assert lines[-1]["epoch"] == 1.0
    english, (job,) = 0, jobs
    for sample in (sample for micro in job.phase.plan.flat() for sample in micro):
        english += int(job.store.lengths[sample]) * job.store.origin(sample).file.endswith("more.jsonl")
    assert 0.15 < english / lines[-1]["tokens"] < 0.25


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("train: full, phases: [{train: lora}]", "give only one of `train` and `phases`"),
        ("phases: [{train: full}, {train: lora}]", "choose one"),
        ("train: lora, forgetting: {stop: 0.1}", "evaluate_every: 50"),
        ("train: everything", "not one of"),
    ],
)
def test_contradictory_settings_are_refused(
    settings: str, message: str, chat_model: Path, tmp_path: Path, tongwen: Any
) -> None:
    code, _, err = tongwen("check", write_recipe(tmp_path, chat_model, settings))
    assert code == 2 and message in err


def test_other_contradictions_are_refused(chat_model: Path, tmp_path: Path, tongwen: Any) -> None:
    recipe = write_recipe(tmp_path, chat_model, "evaluate_every: 1, stop_after: 2 steps")
    code, _, err = tongwen("run", recipe, "prepare.held_out=0")
    assert code == 2 and "there is no held-out data" in err and "held_out: 0.02" in err
    code, _, err = tongwen("check", recipe, "pretrain.adapter={method: full}")
    assert code == 2 and "`train: full`" in err
    text = recipe.read_text().replace("documents:", "dialogues:")
    recipe.write_text(text)
    code, _, err = tongwen("check", recipe)
    assert code == 2 and "documents: ..." in err
