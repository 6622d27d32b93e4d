"""The GRPO script of docs/preference.md, run at tiny size; and the recipe of the page."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tests.conftest import remade, tensors
from tongwen.recipe.load import read

DOCS = Path(__file__).parents[2] / "docs"
PAGE = DOCS / "preference.md"


def block(kind: str, page: Path = PAGE) -> str:
    found = re.search(rf"```{kind}\n(.*?)```", page.read_text(encoding="utf-8"), re.S)
    assert found
    return found[1]


def test_recipe_is_valid_and_the_same_in_both_languages() -> None:
    recipe, _ = read(block("yaml"), "preference.md")
    assert recipe.prefer and recipe.prefer.method == "dpo"
    chinese = DOCS / "preference_zh.md"
    assert yaml.safe_load(block("yaml", chinese)) == yaml.safe_load(block("yaml"))
    assert block("python", chinese).count("\n") == block("python").count("\n")


def test_rewards_judge_language_and_form() -> None:
    held: dict[str, Any] = {}
    exec(block("python").partition("trainer = ")[0], held)
    answers = [
        [{"role": "assistant", "content": text}]
        for text in (r"一共五个。\boxed{5}", "five in all", r"\boxed{1} 和 \boxed{2} 个")
    ]
    assert held["speaks_chinese"](answers)[:2] == [pytest.approx(4 / 9), 0.0]
    assert held["has_form"](answers) == [1.0, 0.0, 0.0]


def test_model_trains_in_grpo_and_merges(
    chat_model: Path, tmp_path: Path, tongwen: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("trl")
    monkeypatch.chdir(tmp_path)
    merged = remade(chat_model, tmp_path / "runs" / "zh-demo" / "merge", {})
    template = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    (merged / "chat_template.jinja").write_text(template, encoding="utf-8")
    (tmp_path / "prompts.jsonl").write_text(block("json") * 4, encoding="utf-8")
    script = block("python")
    for found, tiny in (
        ("learning_rate=1e-5", "learning_rate=1e-1, use_cpu=True, bf16=False, report_to='none', max_steps=2"),
        ("per_device_train_batch_size=8", "per_device_train_batch_size=4"),
        ("num_generations=8", "num_generations=4"),
        ("max_completion_length=256", "max_completion_length=8"),
        ("r=16", "r=4"),
    ):
        assert found in script
        script = script.replace(found, tiny)
    held: dict[str, Any] = {}
    exec(compile(script, str(PAGE), "exec"), held)
    assert held["trainer"].state.global_step == 2
    out = merged.parent
    code, _, err = tongwen("merge", "--base", merged, "--adapter", out / "grpo", "--out", out / "rewarded")
    assert code == 0, err
    before, after = tensors(merged), tensors(out / "rewarded")
    assert before.keys() == after.keys() and any(not torch.equal(before[name], after[name]) for name in before)
