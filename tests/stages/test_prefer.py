"""prefer: TRL's losses over our batches, judged by plain transformers and peft; exact resume; merge equals the live model."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import logsigmoid

from tests.conftest import dialogues, manifest, tensors, write_recipe, write_rows
from tests.launching import kill_at_step, run_forked
from tongwen.cli.main import main

pytest.importorskip("trl")


def pairs(count: int) -> list[dict[str, Any]]:
    """Pairs whose rejected answers have other words and other lengths."""
    return [
        {
            "prompt": f"问题{index}：你好吗？",
            "chosen": f"很好，谢谢！{index}",
            "rejected": "不知道。" * (1 + index % 3),
        }
        for index in range(count)
    ]


def recipe_of(folder: Path, base: Path, prefer: str, rows: list[dict[str, Any]] | None = None, extra: str = "") -> Path:
    """A recipe with `prefer` alone, on a model that has a template."""
    data = write_rows(folder / "pairs.jsonl", pairs(24) if rows is None else rows)
    recipe = folder / "recipe.yaml"
    recipe.write_text(
        f"name: tiny\nbase: {base}\nout: {folder / 'out'}\nprepare: {{preferences: {data}, held_out: 4}}\n"
        "prefer: {adapter: {rank: 4}, max_length: 128, learning_rate: 1e-2, precision: fp32, samples: 0, "
        f"{prefer}}}\n{extra}",
        encoding="utf-8",
    )
    return recipe


@pytest.fixture(scope="module")
def finished(chat_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of sft, prefer and merge: its folder."""
    folder = tmp_path_factory.mktemp("preferred")
    recipe = write_recipe(folder, chat_model, rows=dialogues(10), sft=", stop_after: 2 steps")
    data = write_rows(folder / "pairs.jsonl", pairs(24))
    text = recipe.read_text(encoding="utf-8").replace("prepare: {", f"prepare: {{preferences: {data}, ")
    prefer = "adapter: {rank: 4}, batch_size: 4, max_length: 128, learning_rate: 1e-2, precision: fp32, samples: 1"
    recipe.write_text(f"{text}prefer: {{{prefer}}}\n", encoding="utf-8")
    assert main(["run", str(recipe)]) == 0
    return folder


@pytest.fixture(scope="module")
def spoken(finished: Path) -> Path:
    """The adapter folder that sft left: a base with a template."""
    return finished / "out" / "sft"


class Judge:
    """Base, merged sft adapter and live prefer adapter, by peft and transformers alone."""

    def __init__(self, base: Path, sft: Path, adapter: Path) -> None:
        from peft import PeftModel
        from transformers import AutoModelForCausalLM, AutoTokenizer

        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), sft).merge_and_unload()
        self.live = PeftModel.from_pretrained(model, adapter).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(sft)

    def log_probabilities(self, prompt: Any, answer: Any) -> torch.Tensor:
        """(N,) of the tokens of the answer and the stop token, with the adapter."""
        rendered = [
            self.tokenizer.apply_chat_template(turns, add_generation_prompt=asks, tokenize=False)
            for turns, asks in ((prompt, True), ([*prompt, *answer], False))
        ]
        asked, answered = rendered[0], rendered[1][len(rendered[0]) :].removesuffix("\n")
        assert rendered[1].startswith(asked) and answered.endswith("<|im_end|>")
        before, after = (self.tokenizer(text, add_special_tokens=False)["input_ids"] for text in (asked, answered))
        with torch.no_grad():
            logits = self.live(torch.tensor([before + after])).logits[0, len(before) - 1 : -1]
        return logits.log_softmax(-1).gather(1, torch.tensor(after)[:, None])[:, 0]

    def pair(self, row: dict[str, Any]) -> list[torch.Tensor]:
        return [self.log_probabilities(row["prompt"], row[side]) for side in ("chosen", "rejected")]

    def without_adapter(self, row: dict[str, Any]) -> list[torch.Tensor]:
        with self.live.disable_adapter():
            return self.pair(row)


def read_lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def test_files_ledger_and_scores_of_a_finished_run(finished: Path, chat_model: Path) -> None:
    out = finished / "out"
    rows, aside = (read_lines(out / "prepare" / f"preferences{part}.jsonl") for part in ("", ".held_out"))
    assert (len(rows), len(aside)) == (20, 4) and {*rows[0]} == {"prompt", "chosen", "rejected", "origin"}
    report = json.loads((out / "prefer" / "report.json").read_text(encoding="utf-8"))
    assert report["ledger"]["prepare"]["kept"]["rows"] == report["ledger"]["encode"]["in"]["rows"] == 24
    assert report["mask"]["roles"]["prompt"]["learned"] == 0 and report["mask"]["stop_learned_share"] == 1.0
    found = report["preferences"]
    assert found["accuracy"]["before"] == 0.5 and found["accuracy"]["after"] == 1.0
    lines = read_lines(out / "prefer" / "metrics.jsonl")
    assert lines[0]["loss"] == pytest.approx(0.6931, abs=1e-4) and lines[0]["reward_margin"] == pytest.approx(
        0, abs=1e-5
    )
    assert lines[-1]["loss"] < 0.6 and lines[-1]["reward_accuracy"] == 1.0

    judge = Judge(chat_model, out / "sft", out / "prefer")
    margins = []
    for row in aside:
        (chosen, rejected), (old_chosen, old_rejected) = judge.pair(row), judge.without_adapter(row)
        margins.append(0.1 * float(chosen.sum() - old_chosen.sum() - rejected.sum() + old_rejected.sum()))
    assert found["margin"]["after"] == pytest.approx(sum(margins) / 4, abs=1e-4)
    scored = report["held_out"]["bits_per_byte"]
    answers = [row["chosen"][0]["content"] for row in aside]
    for state, side in (("before", judge.without_adapter), ("after", judge.pair)):
        nats = -sum(float(side(row)[0][:-1].sum()) for row in aside)  # the stop token has no bytes
        size = sum(len(answer.encode()) for answer in answers)
        assert scored[state] == pytest.approx(nats / size / 0.693147, abs=1e-4)


def test_prepare_accounts_for_every_row(chat_model: Path, tmp_path: Path, tongwen: Any) -> None:
    """Duplicates, contamination and bad pairs are lost with a reason; labels and pairs share a file."""
    good, aside = pairs(7), write_rows(tmp_path / "aside.jsonl", pairs(9)[8:])
    labelled = [{"prompt": "问", "completion": "答", "label": label} for label in (True, False)]
    bad = [{**good[0], "rejected": good[0]["chosen"]}, {**good[1], "rejected": " "}]
    recipe = recipe_of(tmp_path, chat_model, "method: kto", [*good, good[2], *pairs(9)[8:], *labelled, *bad])
    recipe.write_text(recipe.read_text().replace("held_out: 4", f"held_out: {aside}, max_bad: 2"))
    code, _, err = tongwen("run", recipe, "--only", "prepare")
    assert code == 0, err
    table = manifest(tmp_path / "out" / "prepare")["ledger"]["preferences"]
    assert (table["in"]["rows"], table["kept"]["rows"], table["held_out"]) == (13, 9, 1)
    lost = {reason: count["rows"] for reason, count in table["lost"].items()}
    assert lost == {"equal_answers": 1, "empty_answer": 1, "duplicate": 1, "contaminated": 1}
    rejected = read_lines(tmp_path / "out" / "prepare" / "rejected.jsonl")
    assert sorted(row["row"] for row in rejected) == [8, 9, 12, 13]


def test_merged_model_is_the_live_one(finished: Path, chat_model: Path) -> None:
    from transformers import AutoModelForCausalLM

    out = finished / "out"
    judge, merged = Judge(chat_model, out / "sft", out / "prefer"), AutoModelForCausalLM.from_pretrained(out / "merge")
    ids = torch.arange(3, 60)[None]
    with torch.no_grad():
        wanted, found = judge.live(ids).logits, merged(ids).logits
        with judge.live.disable_adapter():
            assert (judge.live(ids).logits - found).abs().max() > 1e-3
    assert (wanted - found).abs().max() < 1e-5
    names = manifest(out / "prefer")["parents"]
    assert (
        names["base"]["path"] == str(out / "sft")
        and names["sft"]["fingerprint"] == manifest(out / "sft")["fingerprint"]
    )


def dpo(new: list[torch.Tensor], old: list[torch.Tensor]) -> torch.Tensor:
    margins = [one.sum() - before.sum() for one, before in zip(new, old, strict=True)]
    return -logsigmoid(0.1 * (margins[0] - margins[1]))


def simpo(new: list[torch.Tensor], old: list[torch.Tensor]) -> torch.Tensor:
    return -logsigmoid(2.0 * (new[0].mean() - new[1].mean()) - 1.0)


def orpo(new: list[torch.Tensor], old: list[torch.Tensor]) -> torch.Tensor:
    means = [one.mean() for one in new]
    odds = [mean - torch.log1p(-mean.exp()) for mean in means]
    return -means[0] - 0.1 * logsigmoid(odds[0] - odds[1])


@pytest.mark.sample("dpo", "orpo")
@pytest.mark.parametrize("loss", [dpo, simpo, orpo])
def test_loss_is_the_papers_over_the_whole_step(
    loss: Callable[..., torch.Tensor], chat_model: Path, spoken: Path, tmp_path: Path
) -> None:
    """All pairs in one step of several micro-batches: the loss of step 2 follows from the adapter after step 1."""
    settings = f"method: {loss.__name__}, batch_size: 20, micro_batch_tokens: 300, stop_after: 2 steps, save_every: 1"
    assert main(["run", str(recipe_of(tmp_path, spoken, settings))]) == 0
    out = tmp_path / "out"
    judge = Judge(chat_model, spoken, out / "prefer" / "checkpoints" / "checkpoint-1")
    rows = read_lines(out / "prepare" / "preferences.jsonl")
    wanted = torch.stack([loss(judge.pair(row), judge.without_adapter(row)) for row in rows]).mean()
    assert read_lines(out / "prefer" / "metrics.jsonl")[1]["loss"] == pytest.approx(float(wanted), abs=2e-5)
    assert manifest(out / "prefer")["micro_batches"]["accumulate"] > 3


def test_killed_run_resumes_bit_identically(finished: Path, spoken: Path, tmp_path: Path) -> None:
    """The same training as that of the fixture, killed in its fourth step."""
    recipe = recipe_of(tmp_path, spoken, "batch_size: 4, save_every: 2")
    assert os.WTERMSIG(run_forked("run", recipe, before=kill_at_step(3))) == signal.SIGKILL
    assert not (tmp_path / "out" / "prefer").exists()
    assert run_forked("run", recipe) == 0
    folders = [folder / "out" / "prefer" for folder in (finished, tmp_path)]
    wanted, found = map(tensors, folders)
    assert wanted.keys() == found.keys() and all(torch.equal(wanted[name], found[name]) for name in wanted)
    losses = [[line["loss"] for line in read_lines(folder / "metrics.jsonl")] for folder in folders]
    assert losses[0] == losses[1] and len(losses[0]) == 5


def test_kto_learns_from_labels_and_dpo_points_to_it(spoken: Path, tmp_path: Path, tongwen: Any) -> None:
    rows = [
        {"prompt": row["prompt"], "completion": row["chosen" if index % 2 else "rejected"], "label": bool(index % 2)}
        for index, row in enumerate(pairs(24))
    ]
    recipe = recipe_of(tmp_path, spoken, "method: kto, batch_size: 4, beta: 0.2", rows)
    code, _, err = tongwen("run", recipe)
    assert code == 0, err
    found = json.loads((tmp_path / "out" / "prefer" / "report.json").read_text(encoding="utf-8"))["preferences"]
    assert found["margin"]["after"] > 0.2 and found["accuracy"] == {"before": 0.5, "after": 1.0}
    code, _, err = tongwen("run", recipe, "prefer.method=dpo", f"out={tmp_path / 'other'}")
    assert code == 3 and "answers with a label" in err and "method: kto" in err


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ("adapter: {method: full}", "the model without it is the reference"),
        ("adapter: {rank: 4, dropout: 0.1}", "`adapter.dropout`: leave it out"),
        ("batch_tokens: 100", "`batch_tokens`: leave it out"),
        ("gamma: 1.0", "`gamma` is only for `method: simpo`"),
        ("method: kto, batch_size: 1", "`batch_size` must be at least 2"),
    ],
)
def test_settings_that_cannot_work_are_refused(
    settings: str, says: str, spoken: Path, tmp_path: Path, tongwen: Any
) -> None:
    recipe = recipe_of(tmp_path, spoken, settings)
    recipe.write_text(recipe.read_text().replace("adapter: {rank: 4}, max", "max", settings.count("adapter")))
    code, _, err = tongwen("check", recipe)
    assert code == 2 and says in err


def test_prefer_needs_preferences_one_process_and_trl(
    spoken: Path, tmp_path: Path, tongwen: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_of(tmp_path, spoken, "batch_size: 4")
    code, _, err = tongwen("check", recipe, "devices=2")
    assert code == 2 and "one process" in err
    text = recipe.read_text(encoding="utf-8")
    recipe.write_text(text.replace("preferences:", "dialogues:"), encoding="utf-8")
    code, _, err = tongwen("check", recipe)
    assert code == 2 and "`prefer` needs `prepare: {preferences: ...}`" in err
    recipe.write_text(text, encoding="utf-8")
    monkeypatch.setattr("tongwen.stages.prefer.find_spec", lambda name: None)
    code, _, err = tongwen("run", recipe)
    assert code == 5 and "pip install 'tongwen[preference]'" in err and not (tmp_path / "out" / "prepare").exists()


def test_look_plan_and_show_know_the_stage(finished: Path, tongwen: Any, tmp_path: Path) -> None:
    recipe = finished / "recipe.yaml"
    code, out, err = tongwen("look", recipe, "-n", 2)
    assert code == 0 and "很好，谢谢！" in out and "不知道。" in out, err
    code, out, err = tongwen("plan", recipe, "--json")
    assert code == 0 and json.loads(out)["stages"]["prefer"]["steps"] == 5, err
    code, out, _ = tongwen("show", finished / "out" / "prefer")
    assert code == 0 and "prefer" in out and "sft" in out


def test_preferences_among_dialogues_point_to_their_section(chat_model: Path, tmp_path: Path, tongwen: Any) -> None:
    code, _, err = tongwen("check", write_recipe(tmp_path, chat_model, rows=pairs(8)))
    assert code == 3 and "prepare: {preferences: [FILE]}" in err
