"""`run` on a finished recipe looks whether its files are still what the manifests say."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import write_recipe


@pytest.fixture()
def finished(chat_model: Path, tmp_path: Path, tongwen: Any) -> Path:
    recipe = write_recipe(tmp_path, chat_model, sft=", stop_after: 1 steps", extra="export: {formats: [hf]}\n")
    code, _, err = tongwen("run", recipe)
    assert code == 0, err
    return recipe


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


# One run of the pipeline is tried in each way, and put back each time.
def test_changed_files_of_a_finished_run_are_detected(finished: Path, tongwen: Any) -> None:
    out = finished.parent / "out"
    assert tongwen("run", finished)[0] == tongwen("run", finished, "--verify")[0] == 0
    changes: list[Callable[[Path], Any]] = [Path.unlink, cut, flip]
    for name in (
        "prepare/dialogues.jsonl",
        "sft/adapter_model.safetensors",
        "sft/tokenizer.json",
        "sft/report.json",
        "merge/model.safetensors",
        "merge/config.json",
        "export/hf/model.safetensors",
    ):
        file = out / name
        content = file.read_bytes()
        for change in changes:
            change(file)
            words = ["--verify"] if change is flip else []
            code, _, err = tongwen("run", finished, *words)
            place = str(Path(name).parts[0]) if change is flip and file.suffix == ".safetensors" else name
            assert code == 4 and f"{out}/{place}" in err and "--again" in err and "Traceback" not in err, (
                name,
                change,
                err,
            )
            if change is flip:
                assert tongwen("run", finished)[0] == 0, "at a glance only sizes are compared"
            file.write_bytes(content)
    assert tongwen("run", finished, "--verify")[0] == 0
    for stage in ("prepare", "sft", "merge"):
        assert tongwen("verify", out / stage)[0] == 0


def test_deleted_checkpoints_and_added_files_are_accepted(finished: Path, tongwen: Any) -> None:
    """Checkpoints are deleted to save space, files are added, and older versions recorded no sizes."""
    import shutil

    out = finished.parent / "out"
    shutil.rmtree(out / "sft" / "checkpoints")
    (out / "sft" / "notes.txt").write_text("mine")
    assert tongwen("run", finished, "--verify")[0] == 0
    file = out / "merge" / "manifest.json"
    file.write_text(json.dumps({key: one for key, one in json.loads(file.read_text()).items() if key != "sizes"}))
    assert tongwen("run", finished)[0] == 0
