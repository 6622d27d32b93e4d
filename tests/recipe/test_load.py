"""A recipe is read whole, survives its own dump, and says which settings have no effect."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.recipe.reading import PRETRAIN, SFT, problems, write
from tongwen.recipe.load import dump, load_recipe


def test_missing_file_and_missing_folder_are_errors(tmp_path: Path) -> None:
    assert "this recipe file does not exist" in problems(tmp_path / "none.yaml")[0].text()


@pytest.mark.parametrize(
    "text",
    [
        SFT % "stop_after: 300 steps, adapter: {targets: [q_proj]}",
        SFT % "batch_tokens: 400, schedule: wsd, decay: 0.2, adapter: {method: qlora, quantize: int8}",
        SFT % "adapter: {method: full}",
        PRETRAIN
        % "phases: [{train: new_rows, embedding_learning_rate: 1e-4}, {train: lora}], adapter: {method: qlora}",
    ],
)
def test_recipe_is_frozen_and_round_trips(text: str, tmp_path: Path) -> None:
    recipe, _ = load_recipe(write(tmp_path, text))
    with pytest.raises(ValueError, match="frozen"):
        recipe.seed = 1  # type: ignore[misc]
    again, notices = load_recipe(write(tmp_path, dump(recipe)))
    assert again == recipe
    assert not notices


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        ("{quantize: int8}", "`method: lora` does not use quantize"),
        ("{method: full, rank: 4, dropout: 0.1}", "dropout, rank"),
    ],
)
def test_unused_settings_are_reported(adapter: str, message: str, tmp_path: Path) -> None:
    _, notices = load_recipe(write(tmp_path, SFT % f"adapter: {adapter}"))
    assert any(message in notice for notice in notices)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        (
            "sft: {optimizer: muon, trainer: {adam_beta1: 0.5}}",
            "`optimizer: muon` does not use trainer.adam_beta1",
        ),
        ("sft: {trainer: {optim_args: a=1}}", "`optimizer: adamw` does not use trainer.optim_args"),
        ("sft: {trainer: {adam_beta1: 0.5}}", ""),
        ("pretrain: {train: full, adapter: {rank: 8}}", "`train: full` does not use rank"),
        ("pretrain: {train: lora+embeddings, adapter: {rank: 8}}", ""),
    ],
)
def test_unread_settings_are_reported_once(section: str, message: str, tmp_path: Path) -> None:
    """And they are not in the resolved recipe, where they have no line of the user's."""
    file = write(tmp_path, f"name: t\nbase: b\nprepare: {{dialogues: d.jsonl, documents: t.txt}}\n{section}\n")
    recipe, notices = load_recipe(file)
    assert notices == [message] * bool(message)
    assert load_recipe(write(tmp_path, dump(recipe)))[1] == ([message] if "trainer" in message else [])
