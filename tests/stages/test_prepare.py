"""Every input row is kept or is in rejected.jsonl with its reason, also with datatrove."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.conftest import write_rows
from tongwen.cli.main import main
from tongwen.core.errors import DataError
from tongwen.data import prepare_steps
from tongwen.data.sampling import choose_held_out, draw, order, passes_of

CHARACTERS = "天地玄黄宇宙洪荒日月盈昃辰宿列张寒来暑往秋收冬藏闰余成岁律吕调阳云腾致雨露结为霜金生丽水玉出昆冈"


def sentence(rng: random.Random, length: int = 40) -> str:
    return "".join(rng.choices(CHARACTERS, k=length))


def dialogue_rows(count: int, seed: int = 0) -> list[dict[str, str]]:
    rng = random.Random(seed)
    return [{"instruction": sentence(rng), "input": "", "output": sentence(rng)} for _ in range(count)]


def write_all(folder: Path) -> Path:
    """Three unequal files of dialogues and two of documents with every kind of loss; returns the recipe."""
    rng = random.Random(7)
    rows = dialogue_rows(300)
    bad: list[Any] = [{"instruction": "没有回答"}, 3, None]
    write_rows(folder / "a.jsonl", rows[:40] + bad)
    write_rows(
        folder / "b.jsonl", rows[40:200] + rows[:5] + [{**rows[6], "instruction": rows[6]["instruction"] + "！"}]
    )
    (folder / "c.json").write_text(json.dumps(rows[200:] + rows[100:103]), encoding="utf-8")
    write_rows(folder / "exam.jsonl", [{**rows[60], "output": "另一个回答"}, dialogue_rows(1, seed=9)[0]])
    documents = [sentence(rng, 150) for _ in range(60)]
    documents += [text[:70] + sentence(rng, 4) + text[74:] for text in documents[:10]]
    (folder / "d.txt").write_text("\n\n".join([*documents, "⻓江", "锟斤拷" * 9, "哈" * 300]), encoding="utf-8")
    write_rows(folder / "e.jsonl", [{"text": documents[3]}, {"text": sentence(rng, 120)}, {"words": "x"}])
    recipe = folder / "recipe.yaml"
    recipe.write_text(
        f"""\
name: all
base: none
out: {folder / "out"}
prepare:
  dialogues: [{folder / "a.jsonl"}, {folder / "b.jsonl"}, {folder / "c.json"}]
  documents: [{folder / "d.txt"}, {folder / "e.jsonl"}]
  evaluation: {folder / "exam.jsonl"}
  held_out: 0.1
  max_bad: 10
""",
        encoding="utf-8",
    )
    return recipe


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir()) if file.suffix == ".jsonl"}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("all")
    assert main(["run", str(write_all(folder))]) == 0
    return folder


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_bytes().splitlines()]


def test_every_row_is_kept_or_rejected_with_a_reason(prepared: Path) -> None:
    out = prepared / "out" / "prepare"
    assert not (out / "parts").exists()
    ledger = json.loads((out / "manifest.json").read_text())["ledger"]
    rejected = lines(out / "rejected.jsonl")
    for kind, files in (("dialogues", ("a.jsonl", "b.jsonl", "c.json")), ("documents", ("d.txt", "e.jsonl"))):
        table = ledger[kind]
        kept = lines(out / f"{kind}.jsonl") + lines(out / f"{kind}.held_out.jsonl")
        origins = [(row["origin"]["file"], row["origin"]["row"]) for row in kept]
        lost = [(row["file"], row["row"]) for row in rejected if Path(row["file"]).name in files]
        assert len(set(origins + lost)) == len(origins) + len(lost) == table["in"]["rows"]
        assert table["kept"]["rows"] == len(kept)
        for unit in ("rows", "bytes"):
            assert table["in"][unit] == table["kept"][unit] + sum(one[unit] for one in table["lost"].values())
            assert table["in"][unit] == sum(one["in"][unit] for one in table["files"].values())
        assert {Path(name).name for name in table["files"]} == set(files)
    reasons = {reason: table["rows"] for reason, table in ledger["dialogues"]["lost"].items()}
    assert reasons.pop("duplicate") == 5 + 1 + 3
    assert reasons.pop("contaminated") == 1
    assert sum(reasons.values()) == 3
    reasons = {reason: table["rows"] for reason, table in ledger["documents"]["lost"].items()}
    assert reasons.pop("near_duplicate") == 10 and reasons.pop("duplicate") == 1
    assert reasons == {"mojibake": 1, "repetition": 1, "no_text": 1}
    assert all(row["reason"] and row["rule"] for row in rejected)
    texts = [row["text"] for row in lines(out / "documents.jsonl") + lines(out / "documents.held_out.jsonl")]
    assert "长江" in texts


def test_duplicate_names_the_kept_row(prepared: Path) -> None:
    rejected = lines(prepared / "out" / "prepare" / "rejected.jsonl")
    repeats = [row for row in rejected if row["reason"] == "duplicate" and row["file"].endswith("b.jsonl")]
    assert sorted(row["row"] for row in repeats) == list(range(161, 167))
    assert all(f"a.jsonl:{number}" in row["rule"] for number, row in zip((1, 2, 3, 4, 5, 7), repeats, strict=True))


def test_interrupted_run_resumes_to_the_same_result(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tmp_path / "recipe.yaml"
    text = (prepared / "recipe.yaml").read_text(encoding="utf-8")
    recipe.write_text(text.replace(f"out: {prepared / 'out'}", f"out: {tmp_path / 'out'}"), encoding="utf-8")
    done: list[tuple[str, int]] = []

    class Stop(BaseException):
        pass

    for turn, (name, step) in enumerate(
        (("scan", prepare_steps.scan), ("settle", prepare_steps.settle), ("join", prepare_steps.join))
    ):

        def dying(part: Any, *rest: Any, name: str = name, step: Any = step) -> Any:
            index = getattr(part, "index", 0)
            if name == "join" or index == 3:
                raise Stop
            done.append((name, index))
            return step(part, *rest)

        with monkeypatch.context() as patch:
            patch.setattr(prepare_steps, name, dying)
            with pytest.raises(Stop):
                main(["run", str(recipe)])
        assert not (tmp_path / "out" / "prepare").exists(), turn
    assert len(done) == len(set(done)), "what was finished is not done again"
    assert main(["run", str(recipe)]) == 0
    assert contents(tmp_path / "out" / "prepare") == contents(prepared / "out" / "prepare")


@pytest.mark.sample("1")
@pytest.mark.parametrize("tasks", [1, 4])
def test_datatrove_tasks_give_identical_files(prepared: Path, tmp_path: Path, tasks: int) -> None:
    pytest.importorskip("datatrove")
    overrides = [f"out={tmp_path / 'out'}", "prepare.executor=local", f"prepare.tasks={tasks}"]
    assert main(["run", str(prepared / "recipe.yaml"), *overrides]) == 0
    assert contents(tmp_path / "out" / "prepare") == contents(prepared / "out" / "prepare")


def test_datatrove_task_reports_the_error(prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("datatrove")
    broken = tmp_path / "broken.json"
    broken.write_text('[{"instruction": "a", "output": "b"}, {"instr', encoding="utf-8")
    overrides = [
        f"out={tmp_path / 'out'}",
        "prepare.executor=local",
        "prepare.tasks=2",
        f"prepare.dialogues=[{broken}]",
    ]
    assert main(["run", str(prepared / "recipe.yaml"), *overrides]) == 3
    assert str(broken) in capsys.readouterr().err


def test_contamination_can_be_refused(prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    overrides = [f"out={tmp_path / 'out'}", "prepare.contaminated=refuse"]
    assert main(["run", str(prepared / "recipe.yaml"), *overrides]) == 3
    error = capsys.readouterr().err
    assert "b.jsonl:21" in error and "contaminated: remove" in error


def test_held_out_file_is_not_trained_on(tmp_path: Path) -> None:
    rows = dialogue_rows(30)
    train, held_out = write_rows(tmp_path / "a.jsonl", rows), write_rows(tmp_path / "h.jsonl", rows[10:15])
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        f"name: x\nbase: n\nout: {tmp_path / 'o'}\nprepare: {{dialogues: {train}, held_out: {held_out}}}\n"
    )
    assert main(["run", str(recipe)]) == 0
    out = tmp_path / "o" / "prepare"
    assert [row["origin"]["row"] for row in lines(out / "dialogues.held_out.jsonl")] == [1, 2, 3, 4, 5]
    assert [row["origin"]["row"] for row in lines(out / "dialogues.jsonl")] == [*range(1, 11), *range(16, 31)]
    table = json.loads((out / "manifest.json").read_text())["ledger"]["dialogues"]
    assert (table["train"], table["held_out"], table["kept"]["rows"]) == (25, 5, 25)
    assert table["lost"]["contaminated"]["rows"] == 5


def test_held_out_rows_are_removed_across_data_kinds(tmp_path: Path) -> None:
    rows = dialogue_rows(30)
    text = "前文。" * 9 + rows[3]["instruction"] + "后文。" * 9
    write_rows(tmp_path / "d.jsonl", [{"text": text}, {"text": sentence(random.Random(1), 80)}])
    write_rows(tmp_path / "exam.jsonl", [rows[3]])
    (tmp_path / "h.txt").write_text(sentence(random.Random(2), 90), encoding="utf-8")
    write_rows(tmp_path / "a.jsonl", rows[:3] + rows[4:])
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        f"name: x\nbase: n\nout: {tmp_path / 'o'}\nprepare: {{dialogues: {tmp_path / 'a.jsonl'}, "
        f"documents: {tmp_path / 'd.jsonl'}, evaluation: {tmp_path / 'exam.jsonl'}, held_out: {tmp_path / 'h.txt'}}}\n"
    )
    assert main(["run", str(recipe)]) == 0
    out = tmp_path / "o" / "prepare"
    assert [row["reason"] for row in lines(out / "rejected.jsonl")] == ["contaminated"]
    assert len(lines(out / "documents.jsonl")) == len(lines(out / "documents.held_out.jsonl")) == 1
    assert not (out / "dialogues.held_out.jsonl").exists()


def test_preparing_prepared_data_is_idempotent(prepared: Path, tmp_path: Path) -> None:
    kept = prepared / "out" / "prepare" / "dialogues.jsonl"
    recipe = tmp_path / "r.yaml"
    recipe.write_text(f"name: x\nbase: n\nout: {tmp_path / 'o'}\nprepare: {{dialogues: {kept}, held_out: 0}}\n")
    assert main(["run", str(recipe)]) == 0
    again = [row["messages"] for row in lines(tmp_path / "o" / "prepare" / "dialogues.jsonl")]
    assert again == [row["messages"] for row in lines(kept)]


def test_order_and_split_depend_only_on_the_seed() -> None:
    assert order(8, 42, "epoch", 0) == [1, 7, 2, 3, 4, 5, 0, 6]
    assert order(100, 42, "epoch", 0) == order(100, 42, "epoch", 0) != order(100, 42, "epoch", 1)
    everything = np.ones(100, bool)
    aside = choose_held_out(everything, 0.1, 42)
    assert aside.tolist() == [16, 20, 27, 54, 55, 63, 80, 81, 90, 98]
    fewer = everything.copy()
    fewer[[3, 20, 99]] = False
    assert set(aside) - {20} <= set(choose_held_out(fewer, 10.0, 42)), "who else is there changes nothing"
    assert len(choose_held_out(np.ones(2, bool), 0.01, 1)) == 1, "a share holds out at least one"
    assert len(choose_held_out(np.ones(2, bool), 0, 1)) == 0
    assert len(choose_held_out(everything, 0.5, 1, at_most=7)) == 7
    with pytest.raises(DataError, match="held_out"):
        choose_held_out(np.ones(2, bool), 2, 1)


def test_weight_sets_passes_per_epoch_and_next_epoch_continues() -> None:
    sources = np.array([0] * 10 + [1] * 8 + [2] * 4)
    epochs = [draw(sources, [1, 0.5, 2], 3, epoch) for epoch in range(2)]
    for chosen in epochs:
        counts = np.bincount(chosen, minlength=22)
        assert (counts[:10] == 1).all() and counts[10:18].sum() == 4 and (counts[18:] == 2).all()
    halves = [{sample for sample in chosen if 10 <= sample < 18} for chosen in epochs]
    assert halves[0] | halves[1] == set(range(10, 18))
    assert epochs[0] != epochs[1] and draw(sources, [1, 0.5, 2], 3, 0) == epochs[0]
    assert draw(sources, [1, 1, 1], 3, 0) == order(22, 3, "epoch", 0)


@pytest.mark.parametrize("shares", [(None, 0.2), (None, 0.9), (0.25, 0.75)])
def test_shares_are_measured_in_tokens(shares: tuple[float | None, float]) -> None:
    tokens = [1000, 400]
    passes = passes_of(tokens, [None, None], shares)
    drawn = [held * times for held, times in zip(tokens, passes, strict=True)]
    assert drawn[1] / sum(drawn) == pytest.approx(shares[1])
    if shares[0] is not None:
        assert max(passes) == pytest.approx(1), "nothing is repeated, something is used up"


def test_changed_source_restarts_prepare(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = dialogue_rows(20)
    data = write_rows(tmp_path / "a.jsonl", rows)
    recipe = tmp_path / "r.yaml"
    recipe.write_text(f"name: x\nbase: n\nout: {tmp_path / 'o'}\nprepare: {{dialogues: {data}, held_out: 0}}\n")
    with monkeypatch.context() as patch:
        patch.setattr(prepare_steps, "compare", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert main(["run", str(recipe)]) == 130
    write_rows(data, rows[:7])
    assert main(["run", str(recipe)]) == 0
    assert len(lines(tmp_path / "o" / "prepare" / "dialogues.jsonl")) == 7
    shutil.rmtree(tmp_path / "o")


def test_show_reports_row_counts_by_reason(prepared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", str(prepared / "out" / "prepare")]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "dialogues: 312 − contaminated 1 − duplicate 9" in shown and shown.endswith("= 299")


@pytest.mark.parametrize("command", [["run"], ["check"]])
def test_held_out_file_of_another_kind_is_refused(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train = write_rows(tmp_path / "a.jsonl", dialogue_rows(9))
    (tmp_path / "h.txt").write_text("一段文字\n", encoding="utf-8")
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        f"name: x\nbase: n\nout: {tmp_path / 'o'}\nprepare: {{dialogues: {train}, held_out: {tmp_path / 'h.txt'}}}\n"
    )
    assert main([*command, str(recipe)]) == 3
    error = capsys.readouterr().err
    assert (
        "h.txt" in error
        and "this file contains documents, but the recipe has dialogues" in error
        and "held_out: 0.02" in error
    )


def test_check_accepts_a_kind_that_is_only_held_out(tmp_path: Path) -> None:
    write_rows(tmp_path / "d.jsonl", [{"text": sentence(random.Random(index))} for index in range(50)])
    write_rows(tmp_path / "exam.jsonl", dialogue_rows(3))
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        f"name: x\nbase: n\nout: {tmp_path / 'o'}\n"
        f"prepare: {{documents: {tmp_path / 'd.jsonl'}, evaluation: {tmp_path / 'exam.jsonl'}, held_out: 10}}\n"
    )
    assert main(["check", str(recipe)]) == 0
    assert main(["run", str(recipe)]) == 0
