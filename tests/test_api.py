"""tongwen as a library: its functions do what the commands do, and return objects."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

import tongwen
from tests.conftest import tensors, write_recipe
from tongwen.core.errors import ArtifactError, DataError, RecipeError, TongwenError


@pytest.fixture(scope="module")
def made(chat_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], tongwen.RunResult]:
    folder = tmp_path_factory.mktemp("api")
    text = write_recipe(folder, chat_model, sft=", stop_after: 4 steps", extra="evaluate: {}\n").read_text()
    recipe = yaml.safe_load(text)
    return recipe, tongwen.run(recipe)


def test_run_takes_a_dictionary_and_returns_what_was_made(made: tuple[dict[str, Any], tongwen.RunResult]) -> None:
    recipe, done = made
    assert list(done.stages) == ["prepare", "sft", "merge", "evaluate"] and str(done.folder) == recipe["out"]
    assert done.report()["held_out"]["bits_per_byte"]["after"] > 0
    assert [line["step"] for line in done.metrics("sft")] == [1, 2, 3, 4]
    assert done.model == done.folder / "merge" and done.scores()
    assert isinstance(done.open(precision="fp32").chat([{"role": "user", "content": "你好"}], max_new_tokens=4), str)
    assert "<svg" in done._repr_html_() and "<td>sft</td>" in done._repr_html_()
    with pytest.raises(ArtifactError):
        done.report("pretrain")


def test_run_again_does_nothing(made: tuple[dict[str, Any], tongwen.RunResult]) -> None:
    recipe, done = made
    times = {file: file.stat().st_mtime_ns for file in done.folder.rglob("*.safetensors")}
    assert tongwen.run(recipe).stages.keys() == done.stages.keys()
    assert times == {file: file.stat().st_mtime_ns for file in done.folder.rglob("*.safetensors")}
    with pytest.raises(RecipeError, match="--again"):
        tongwen.run(recipe, "sft.learning_rate=1e-3")


def test_merge_equals_the_stage(made: tuple[dict[str, Any], tongwen.RunResult], tmp_path: Path) -> None:
    recipe, done = made
    merged = tongwen.merge(recipe["base"], done.stages["sft"].path, tmp_path / "merged")
    assert tensors(merged.path).keys() == tensors(done.model).keys()
    assert merged.fingerprint == done.stages["merge"].fingerprint
    with pytest.raises(RecipeError, match="already exists"):
        tongwen.merge(recipe["base"], [done.stages["sft"].path], tmp_path / "merged")


def test_check_returns_the_ledger(made: tuple[dict[str, Any], tongwen.RunResult], tmp_path: Path) -> None:
    found = tongwen.check(made[0], f"out={tmp_path / 'x'}")
    assert found.stages == ["prepare", "sft", "merge", "evaluate"] and found.data["dialogues"]["kept"]["rows"] > 0
    with pytest.raises(TongwenError, match=r"recipe:\d+ · sft"):
        tongwen.check({**made[0], "sft": {"rank": 3, "batch_size": 0}})


def test_load_data_gives_rows_and_what_was_rejected(tmp_path: Path) -> None:
    rows = [
        {"instruction": "问", "output": "答"},
        {"instruction": "问", "output": 7},
        {"instruction": "二", "output": "三"},
    ]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = tongwen.load_data(tmp_path / "a.jsonl")
    assert [row["messages"][-1]["content"] for row in found] == ["答", "三"] and len(found) == 2
    assert [(one["row"], bool(one["rule"])) for one in found.rejected] == [(2, True)]
    assert found.to_dataset()[1]["messages"][0]["content"] == "二"
    (tmp_path / "b.txt").write_text("天地玄黄\n\n宇宙洪荒\n")
    assert "天地玄黄" in tongwen.load_data(tmp_path / "b.txt", records="file")[0]["text"]
    pair = {"prompt": "问", "chosen": "好", "rejected": "坏"}
    (tmp_path / "c.jsonl").write_text(json.dumps(pair) + "\n")
    assert tongwen.load_data(tmp_path / "c.jsonl")[0]["rejected"]
    with pytest.raises(DataError):
        tongwen.load_data(tmp_path / "c.jsonl", kind="dialogues")
    with pytest.raises(RecipeError, match="kind"):
        tongwen.load_data(tmp_path / "c.jsonl", kind="texts")
    with pytest.raises(DataError):
        tongwen.load_data(tmp_path / "no.jsonl")


def test_import_is_light() -> None:
    code = "import sys, tongwen; print(len([name for name in sys.modules if name.startswith('tongwen.')]), hasattr(tongwen, 'x'))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["0", "False"]
