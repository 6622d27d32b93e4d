"""Files of version 0.1 can be opened and continued: no renaming or moving in the code may cost a user a run.

make.py in tests/data/v0.1 made that folder once; it is never regenerated. The tests use the command line, with relative paths,
in a copy of the folder.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import tongwen as package
from tests.conftest import tensors, type_lines
from tongwen.train.packing import BatchPlan, make_plan
from tongwen.workflows.training import phases

DATA = Path(__file__).parents[1] / "data" / "v0.1"
ATOL = (
    1e-6  # what another processor may move a weight by: with other kernels it was 1.2e-7, with those that made them 0
)
TIMES = {"seconds", "cpu_seconds", "tokens_per_second"}
RUNS = {"sft": ("sft", 10), "pretrain": ("pretrain", 12), "phases": ("pretrain", 12)}  # recipe: stage, steps


def load_make() -> Any:
    """Load the script, for its servers."""
    spec = importlib.util.spec_from_file_location("v01_make", DATA / "make.py")
    assert spec and spec.loader
    module = sys.modules["v01_make"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


make = load_make()


@pytest.fixture()
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder: a copy of all files of version 0.1 with their times."""
    folder = tmp_path / "elsewhere"
    shutil.copytree(DATA, folder, ignore=shutil.ignore_patterns("make.py", "__pycache__"))
    for file in folder.rglob("*"):
        os.utime(file, (make.MTIME, make.MTIME))
    monkeypatch.chdir(folder)
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    return folder


def read(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8"))


def rows(file: Path) -> list[Any]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def hashes(folder: Path) -> dict[str, str]:
    files = (file for file in folder.rglob("*") if file.is_file() and file.name != ".lock")
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def is_of_this_version(folder: Path) -> bool:
    """Return whether caches that record a version are still valid."""
    return read(next(folder.glob("*/manifest.json")))["tongwen"] == package.__version__


# -- training ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RUNS)
def test_stopped_run_resumes_to_the_same_result(
    name: str, place: Path, tongwen: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`phases` was stopped in its second phase, and its base is a vocabulary stage. The sums of version 0.1 stay: all
    its steps have the same number of micro-batches."""
    uniform = list[bool]()

    def plan(*args: Any, **kwargs: Any) -> BatchPlan:
        uniform.append(kwargs["uniform"])
        return make_plan(*args, **kwargs)

    monkeypatch.setattr(phases, "make_plan", plan)
    stage, steps = RUNS[name]
    expected = place / ("finished/sft" if name == "sft" else f"expected/{name}")
    left = place / name / f"{stage}.partial"
    run, before, stopped = read(left / "run.json"), read(left / "before.json"), rows(left / "metrics.jsonl")
    phase, taken = ("phase-2/", 4) if name == "phases" else ("", 0)
    done = taken + max(int(file.name[11:]) for file in left.glob(f"checkpoints/{phase}checkpoint-*"))
    assert 0 < done <= len(stopped) < steps, "it was stopped in the middle"

    code, out, err = tongwen("run", f"{name}.yaml", f"--until={stage}")
    assert code == 0, err
    assert uniform and all(uniform)
    assert f"continuing after step {done} of {steps}" in out
    assert "prepare: already done" in out
    if stage != "sft":  # the text of its template has changed since: its tokens are encoded again
        assert ("tokens: already encoded" in out) == is_of_this_version(place / name)
    made, manifest = place / name / stage, read(place / name / stage / "manifest.json")
    assert (manifest["run"], manifest["forks"], manifest["steps"]) == (run["run"], [], steps)
    assert read(made / "before.json") == before
    assert not left.exists()

    wanted, found = rows(expected / "metrics.jsonl"), rows(made / "metrics.jsonl")
    assert found[:done] == stopped[:done], "what was done is not done again"
    assert len(found) == len(wanted) == steps
    for one, other in zip(found, wanted, strict=True):
        assert one.keys() == other.keys()
        for key in one.keys() - TIMES:
            exact = isinstance(other[key], int) or key in ("epoch", "learning_rate")
            assert one[key] == (other[key] if exact else pytest.approx(other[key], rel=1e-5)), (one["step"], key)
    wanted, found = tensors(expected), tensors(made)
    assert found.keys() == wanted.keys()
    for key in wanted:
        assert torch.allclose(found[key], wanted[key], rtol=0, atol=ATOL), key


@pytest.mark.parametrize(
    ("change", "stage"),
    [("sft.learning_rate=2e-3", "sft.partial"), ("sft.adapter.rank=4", "sft.partial"), ("seed=7", "prepare")],
)
def test_other_settings_are_refused(change: str, stage: str, place: Path, tongwen: Any) -> None:
    before = hashes(place / "sft" / "sft.partial")
    code, _, err = tongwen("run", "sft.yaml", change)
    assert (
        code == 2
        and f"sft/{stage}: the existing result was made from different settings" in err
        and change.split("=")[0] in err
    )
    assert hashes(place / "sft" / "sft.partial") == before


def test_fork_records_its_origin(place: Path, tongwen: Any) -> None:
    run = read(place / "sft" / "sft.partial" / "run.json")["run"]
    code, _, err = tongwen("run", "sft.yaml", "sft.learning_rate=2e-3", "sft.evaluate_every=9", "--fork", "--until=sft")
    assert code == 0, err
    (fork,) = read(place / "sft" / "sft" / "manifest.json")["forks"]
    assert fork["from"] == run and fork["changed"] == [["sft.learning_rate", 0.001, 0.002]]


# -- what is finished ----------------------------------------------------------------------------------------------


def test_finished_run_is_not_repeated(place: Path, tongwen: Any) -> None:
    before = hashes(place / "finished")
    code, out, err = tongwen("run", "sft.yaml", "out=finished")
    assert code == 0, err
    assert [stage for stage in ("prepare", "sft", "merge") if f"{stage}: already done" in out] == [
        "prepare",
        "sft",
        "merge",
    ]
    assert hashes(place / "finished") == before
    code, _, err = tongwen("run", "sft.yaml", "out=finished", "sft.learning_rate=2e-3")
    assert code == 2 and "0.001 → 0.002" in err


def test_repeated_merge_is_byte_identical(place: Path, tongwen: Any) -> None:
    code, _, err = tongwen("merge", "--base", "base", "--adapter", "finished/sft", "--out", "merged")
    assert code == 0, err
    new, old = place / "merged", place / "finished" / "merge"
    assert hashes(new).keys() == hashes(old).keys()
    assert (new / "model.safetensors").read_bytes() == (old / "model.safetensors").read_bytes()
    assert read(new / "manifest.json")["fingerprint"] == read(old / "manifest.json")["fingerprint"]


@pytest.mark.parametrize("stage", ["sft", "merge"])
def test_artifacts_are_shown_and_verified(stage: str, place: Path, tongwen: Any) -> None:
    path = f"finished/{stage}"
    code, out, err = tongwen("show", path, "--json")
    assert code == 0, err
    assert json.loads(out)["artifacts"] == {path: read(place / path / "manifest.json")}
    code, out, err = tongwen("verify", path)
    assert code == 0 and "agree" in out, err
    file = next(file for file in (place / path).iterdir() if file.suffix == ".safetensors")
    file.write_bytes(file.read_bytes()[:-2] + b"5\n")
    code, _, err = tongwen("verify", path)
    assert code == 4 and "manifest.json says" in err


def test_lineage_is_complete(place: Path, tongwen: Any) -> None:
    code, out, err = tongwen("show", "finished/merge")
    assert code == 0, err
    for stage in ("merge", "sft", "prepare"):
        assert read(place / "finished" / stage / "manifest.json")["fingerprint"][:12] in out
    assert "has changed since" not in out


def test_show_html_reports_the_scores(place: Path, tongwen: Any) -> None:
    code, out, err = tongwen("show", "finished", "--html", "page.html")
    assert code == 0, err
    report, manifest = (read(place / "finished" / "sft" / f"{name}.json") for name in ("report", "manifest"))
    for number in (f"{report['held_out']['bits_per_byte']['after']:.4f}", f"{manifest['tokens']:,}"):
        assert number in out and number in (place / "page.html").read_text(encoding="utf-8")


# -- conversations -------------------------------------------------------------------------------------------------


def test_saved_conversation_is_byte_identical(place: Path, tongwen: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = read(place / "chat.json")["messages"]
    assert [turn["role"] for turn in kept] == ["user", "assistant"] * 2
    type_lines([*(turn["content"] for turn in kept[::2]), "/save again.json"], monkeypatch)
    code, _, err = tongwen("chat", "finished/merge", "--max-new-tokens", 8)
    assert code == 0, err
    assert (place / "again.json").read_bytes() == (place / "chat.json").read_bytes()


def test_page_opens_stored_conversations(place: Path) -> None:
    """The browser stores the chat under a name and a secret, which must not change either."""
    pytest.importorskip("gradio")
    import httpx

    from tests.serving.web.page_server import TOKEN, Parrot, make_chat_backend, serving
    from tongwen.serving.web.backend import PageBackend

    kept = read(place / "shelf.json")
    with (
        serving(PageBackend("tongwen", make_chat_backend(Parrot(), "parrot"))) as url,
        httpx.Client(base_url=url, headers={"authorization": f"Bearer {TOKEN}", "origin": url}, timeout=30) as web,
    ):
        page = web.get("/en/config").json()
        events = page["dependencies"]
        (picker,) = (one["id"] for one in page["components"] if one["props"].get("elem_id") == "conversations")
        (state,) = (one for one in page["components"] if one["type"] == "browserstate")
        assert (state["props"]["storage_key"], state["props"]["secret"]) == ("tongwen.conversations", "tongwen")

        def call(event: dict[str, Any], given: list[Any]) -> list[Any]:
            body = {"data": given, "fn_index": event["id"], "session_hash": "law"}
            answer = web.post("/en/gradio_api/run/predict", json=body)
            assert answer.status_code == 200, answer.text
            return list(answer.json()["data"])

        listed = next(one for one in events if one["outputs"] == [picker])
        opened = next(one for one in events if one["targets"] == [[picker, "input"]])
        keep = next(
            one for one in events if one["inputs"][:1] == one["outputs"][:1] == [state["id"]] and len(one["inputs"]) > 2
        )
        (found,) = call(listed, [kept, 0])
        assert found["choices"] == [[kept[0]["title"], kept[0]["number"]]]
        _, board, *_, system, _ = call(opened, [kept, kept[0]["number"]])
        assert system == kept[0]["system"]
        again, *_ = call(keep, [kept, None, board, [], system])  # the number stays with the server
    assert again == kept, "what was opened is kept as it was"


@pytest.mark.parametrize("model", ["finished/sft", "finished/merge"])
def test_python_api_opens_old_models(model: str, place: Path) -> None:
    kept = read(place / "chat.json")["messages"]
    opened_model = package.open(model)
    assert opened_model.chat(kept[:1], max_new_tokens=8) == kept[1]["content"]


# -- what was killed on its way ------------------------------------------------------------------------------------


def test_prepare_resumes_between_files(place: Path, tongwen: Any) -> None:
    done = list(place.glob("pieces/prepare.partial/parts/*/scan.json"))
    assert 0 < len(done) < 8
    code, out, err = tongwen("run", "pieces.yaml")
    assert code == 0, err
    assert "continuing the interrupted work" in out
    for file in sorted((place / "expected" / "pieces").iterdir()):
        wanted = file.read_bytes().replace(b"stands", b"appears")  # reworded since v0.1
        assert (place / "pieces" / "prepare" / file.name).read_bytes() == wanted, file.name


def test_encoding_resumes_between_rows(place: Path, tongwen: Any) -> None:
    (left,) = place.glob("encode/tokens/sft/*.partial")
    done = json.loads((left / "journal.jsonl").read_text().splitlines()[-1])["rows"]
    code, out, err = tongwen("run", "encode.yaml")
    assert code == 0, err
    assert done > 0 and "encoding continues" not in out, (
        "the text of its template has changed since: all rows are encoded again"
    )
    (made,) = place.glob("encode/tokens/sft/*/store.json")
    assert read(made) == read(place / "expected" / "encode" / "store.json")


def test_existing_answers_are_not_generated_again(place: Path, tongwen: Any) -> None:
    journal = place / "answers.jsonl.answers"
    head, *kept = journal.read_text(encoding="utf-8").splitlines()
    done = [json.loads(line) for line in kept if line.endswith("]")]
    first, text = done[0]
    marked = [json.dumps([first, "kept"]), *kept[1:]]
    journal.write_text("\n".join([head, *marked]) + "\n", encoding="utf-8")
    arguments = ["--prompts", "prompts.jsonl", "--max-new-tokens", 40, "--batch-size", 1, "--out", "answers.jsonl"]
    code, out, err = tongwen("generate", "--model", "base", "--template", "chatml", *arguments)
    assert code == 0, err
    assert f"{len(done)} answers already exist" in out and 0 < len(done) < 12
    found, wanted = rows(place / "answers.jsonl"), rows(place / "expected" / "answers.jsonl")
    assert found[first].pop("answer") == "kept" and wanted[first].pop("answer") == text
    assert found == wanted and not journal.exists()


def test_interrupted_evaluation_resumes(place: Path, tongwen: Any) -> None:
    (journal,) = (place / "scores.answers").iterdir()
    head, *kept = journal.read_text(encoding="utf-8").splitlines()
    first = json.loads(kept[0])[0]
    journal.write_text("\n".join([head, json.dumps([first, "kept"]), *kept[1:]]) + "\n", encoding="utf-8")
    arguments = [
        "--task",
        "exact_match",
        "--limit",
        12,
        "--data",
        "dialogues.jsonl",
        "--max-new-tokens",
        20,
        "--batch-size",
        1,
    ]
    code, _, err = tongwen("evaluate", "--model", "base", "--template", "chatml", *arguments, "--out", "scores")
    assert code == 0, err
    answers = [row for file in (place / "scores").glob("*.jsonl") for row in rows(file)]
    assert sum("kept" in row.values() for row in answers) == 1
    assert not (place / "scores.answers").exists()


def test_paid_replies_are_not_requested_again(place: Path, tongwen: Any) -> None:
    paid = rows(place / "synthesize" / "synthesize.partial" / "journal.jsonl")
    with make.serving(make.Endpoint) as (url, requests):
        code, out, err = tongwen("run", "synthesize.yaml", f"synthesize.endpoint={url}/v1")
    assert code == 0, err
    assert len(paid) == 3 and "3 replies already exist" in out and len(requests) == 3
    made, expected = (folder / "synthesize" for folder in (place / "synthesize", place / "expected"))
    found, wanted = rows(made / "dialogues.jsonl"), rows(expected / "dialogues.jsonl")
    for row in (*found, *wanted):
        del row["meta"]["endpoint"]  # which has another port each time
    assert found == wanted
    assert rows(made / "journal.jsonl")[:3] == paid


def test_half_downloaded_model_resumes(place: Path, tongwen: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    (part,) = place.glob("fetched.partial/.fetch/*.part")
    half = part.read_bytes()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with make.serving(make.Hub, files=make.hub_files(place)) as (url, requests):
        monkeypatch.setenv("HF_ENDPOINT", url)
        code, _, err = tongwen("fetch", "tiny/model", "--kind", "model", "--out", "fetched")
    assert code == 0, err
    files = [f"/tiny/model/resolve/{make.Hub.commit}/{name}" for name in ("model.safetensors", "tokenizer.json")]
    assert requests == [f"{files[0]} bytes={len(half)}-", files[1]], (
        "neither the list nor the first half is requested again"
    )
    whole = (place / "fetched" / "model.safetensors").read_bytes()
    assert whole == (place / "base" / "model.safetensors").read_bytes() and whole.startswith(half)


def test_cached_dataset_is_used_without_the_hub(place: Path, tongwen: Any) -> None:
    assert tongwen("verify", "cache/tongwen/data/tiny--rows")[0] == 0
    code, _, err = tongwen("run", "hub.yaml")
    assert code == 0, err
    for name in ("dialogues.jsonl", "dialogues.held_out.jsonl"):
        found, wanted = (rows(place / run / "prepare" / name) for run in ("hub", "finished"))
        assert [row["messages"] for row in found] == [row["messages"] for row in wanted]
