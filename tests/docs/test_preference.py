"""The TRL script of docs/preference.md, run at tiny size."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import dialogues, tensors, write_recipe

PAGE = Path(__file__).parents[2] / "docs" / "preference.md"


def test_merged_model_trains_in_trl(
    chat_model: Path, tmp_path: Path, tongwen: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("trl")
    monkeypatch.chdir(tmp_path)
    recipe = write_recipe(tmp_path, chat_model, rows=dialogues(10), sft=", stop_after: 2 steps")
    recipe.write_text(recipe.read_text().replace(str(tmp_path / "out"), "runs/zh-demo"))
    code, _, err = tongwen("run", recipe)
    assert code == 0, err
    row, script = (
        re.search(rf"```{kind}\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S)[1] for kind in ("json", "python")
    )  # type: ignore[index]
    (tmp_path / "pairs.jsonl").write_text(row * 8, encoding="utf-8")
    for found, tiny in (
        ("learning_rate=5e-6", "learning_rate=1e-2, use_cpu=True, bf16=False, report_to='none'"),
        ("r=16", "r=4"),
    ):
        assert found in script
        script = script.replace(found, tiny)
    held: dict[str, Any] = {}
    exec(compile(script, str(PAGE), "exec"), held)
    trainer = held["trainer"]
    assert trainer.state.global_step == 2
    stop, sample = trainer.processing_class.convert_tokens_to_ids("<|im_end|>"), trainer.train_dataset[0]
    assert stop in sample["chosen_ids"] and stop in sample["rejected_ids"]
    code, _, err = tongwen(
        "merge", "--base", "runs/zh-demo/merge", "--adapter", "runs/zh-demo/dpo", "--out", "runs/zh-demo/preferred"
    )
    assert code == 0, err
    before, after = (tensors(Path("runs/zh-demo") / name) for name in ("merge", "preferred"))
    assert before.keys() == after.keys() and any(not torch.equal(before[name], after[name]) for name in before)
