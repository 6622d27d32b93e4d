"""What a visitor of the page starts: a recipe of the folders, and no change of it names what lies outside."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tongwen.core.errors import MachineError, RecipeError, TongwenError
from tongwen.workflows import page_runs, run_manager
from tongwen.workflows.workspace import Workspace

RECIPE = """name: r
base: {top}/models/base
out: {top}/runs/r
prepare: {{documents: {outside}/own.txt, dialogues: {top}/d.jsonl}}
pretrain: {{adapter: {{method: lora}}}}
sft: {{template: chatml}}
"""
REFUSED = "outside the folders|not here|does not exist|takes such a character"
KEYS = (
    "base",
    "prepare.documents",
    "prepare.dialogues",
    "prepare.evaluation",
    "prepare.held_out",
    "sft.adapter.continue_from",
    "sft.engine",
    "pretrain.adapter.continue_from",
    "sft.template",
    "out",
)
OUTSIDE = (
    "{outside}/secret{end}",
    "{outside}",
    "../outside/secret{end}",
    "{top}/../outside/secret{end}",
    "{top}/link/secret{end}",
    "{top}/.hidden/secret{end}",
    "{top}/*/../../outside/*{end}",
    "~/secret{end}",
    "/etc/passwd{end}",
    "file://{outside}/secret{end}",
    "http://127.0.0.1:9/x{end}",
    "s3://bucket/x{end}",
    "hub:owner/name{end}",
    '"\\x2fetc\\x2fpasswd{end}"',
    '"\\0{end}"',
    "{top}/" + "x" * 300 + "{end}",
)


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workspace:
    top, outside = tmp_path / "top", tmp_path / "outside"
    for file in (outside / "secret.jinja", outside / "own.txt", top / ".hidden" / "secret.jinja", top / "d.jsonl"):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("x", encoding="utf-8")
    (top / "link").symlink_to(outside)
    (top / "models" / "base").mkdir(parents=True)
    (top / "recipe.yaml").write_text(RECIPE.format(top=top, outside=outside), encoding="utf-8")
    monkeypatch.chdir(top)
    monkeypatch.setenv("HOME", str(outside))
    return Workspace.of([str(top)])


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What would be started."""
    calls: list[Any] = []
    monkeypatch.setattr(run_manager, "start", lambda *given: calls.append(given))
    return calls


@pytest.mark.parametrize("key", KEYS)
def test_no_change_names_what_lies_outside(key: str, workspace: Workspace, started: list[Any]) -> None:
    end = ".json" if key == "sft.engine" else ".jinja"
    for form in OUTSIDE if key != "sft.engine" else (form for form in OUTSIDE if "{end}" in form):
        value = form.format(top=workspace.folders[0], outside=workspace.folders[0].parent / "outside", end=end)
        with pytest.raises(TongwenError) as refused:
            page_runs.start(workspace, "recipe.yaml", [f"{key}={value}"])
        assert re.search(REFUSED, str(refused.value)), (value, refused.value)
    assert not started


@pytest.mark.parametrize(
    "change",
    [
        "base=gpt2",
        "base=owner/name",
        "prepare.dialogues={path: hub:owner/name}",
        "prepare={documents: /etc/passwd, dialogues: d.jsonl}",
        "prepare.documents=[d.jsonl,/etc/passwd]",
        "prepare.executor_options.logging_dir=logs",
        "sft.trainer.optim_args=x",
        "sft.engine=/etc/ds.json",
        "sft.engine=../outside/ds.yaml",
        "export={formats: hf, push: owner/name} merge.shard_gb=1",
        "evaluate={tasks: {task: lm_eval, suite: /etc/x.yaml}}",
        "evaluate={tasks: {task: exact_match, data: /etc/passwd}}",
        "evaluate={tasks: {task: multiple_choice, examples: /etc}}",
        "vocab={tokenizer: /etc}",
        "synthesize={endpoint: http://127.0.0.1:9/v1, model: m, rows: 1}",
        "synthesize={endpoint: http://127.0.0.1:9/v1, key: AWS_SECRET, model: m, rows: 1}",
        "out=.hidden/run",
    ],
)
def test_no_change_names_a_hub_another_machine_or_foreign_arguments(
    change: str, workspace: Workspace, started: list[Any]
) -> None:
    with pytest.raises(TongwenError, match=REFUSED):
        page_runs.start(workspace, "recipe.yaml", re.split(" (?=merge)", change))
    assert not started


def test_changes_inside_of_the_folders_are_started(workspace: Workspace, started: list[Any]) -> None:
    """What the recipe itself names outside is its owner's decision, also beside a change."""
    top = workspace.folders[0]
    (top / "t.jinja").touch()
    for changes in (
        [],
        ["sft.learning_rate=2e-4", "out=runs/second"],
        ["prepare.dialogues=d.jsonl", "sft.template=alpaca", "base=models/base"],
        [f"prepare.dialogues={top}/d*.jsonl", "sft.template=t.jinja", "sft.engine=ddp", "prepare.held_out=3"],
    ):
        page_runs.start(workspace, "recipe.yaml", changes)
        assert started.pop()[0] == [str(top / "recipe.yaml"), *changes]


def test_only_recipes_and_runs_are_opened(workspace: Workspace, started: list[Any]) -> None:
    top = workspace.folders[0]
    hidden = top / ".hidden" / "recipe.yaml"
    (top / "notes.yaml").write_text("a: 1\n", encoding="utf-8")
    hidden.write_text((top / "recipe.yaml").read_text(encoding="utf-8"), encoding="utf-8")
    for name in ("d.jsonl", "notes.yaml", ".hidden/recipe.yaml", str(hidden), "none.yaml", ".", str(top.parent)):
        with pytest.raises(RecipeError):
            page_runs.start(workspace, name, [])
        with pytest.raises(RecipeError):
            workspace.recipe(name)
        with pytest.raises(RecipeError):
            workspace.run(name)
    assert not started and workspace.recipes() == ["recipe.yaml"]


def test_run_that_writes_elsewhere_or_links_outside_is_not_continued(workspace: Workspace, started: list[Any]) -> None:
    top = workspace.folders[0]
    run = top / "runs" / "r"
    run.mkdir(parents=True)
    text = (top / "recipe.yaml").read_text(encoding="utf-8")
    (run / ".lock").touch()
    for out in (top.parent / "outside" / "run", top / "runs" / "other"):
        (run / "recipe.yaml").write_text(text.replace(f"{top}/runs/r", str(out)), encoding="utf-8")
        with pytest.raises(RecipeError):
            page_runs.resume(workspace, "runs/r")
    assert not started
    (run / "recipe.yaml").write_text(text, encoding="utf-8")
    page_runs.resume(workspace, "runs/r")
    assert started == [([str(run / "recipe.yaml")], run)]
    (run / "run.log").symlink_to(top.parent / "outside" / "secret.jinja")
    with pytest.raises(RecipeError, match="outside"):
        workspace.run("runs/r")


HOLD = (
    "import sys; from pathlib import Path; from tongwen.workflows.run_lock import lock_folder\n"
    "with lock_folder(Path(sys.argv[1])): print('held', flush=True); input()"
)


@pytest.fixture
def holders(workspace: Workspace) -> Iterator[None]:
    """As many runs as the page starts."""
    with ExitStack() as running:
        for number in range(page_runs.MAX_RUNS):
            out = workspace.folders[0] / f"run{number}"
            out.mkdir()
            (out / "recipe.yaml").touch()
            holder = running.enter_context(
                subprocess.Popen([sys.executable, "-c", HOLD, str(out)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            )
            assert holder.stdout and holder.stdout.readline() == b"held\n"
        yield


def test_number_of_runs_at_once_is_limited(workspace: Workspace, holders: None, started: list[Any]) -> None:
    with pytest.raises(MachineError, match="4 runs are in progress"):
        page_runs.start(workspace, "recipe.yaml", [])
    assert not started
