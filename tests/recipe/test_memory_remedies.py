"""What a training stage can do with less memory is written as changes of its recipe."""

from __future__ import annotations

from typing import Any

import pytest

from tongwen.recipe.memory_remedies import cheaper
from tongwen.recipe.schema import Recipe
from tongwen.recipe.training import Training

SETTINGS = ["micro_batch_tokens=1024", "activation_checkpointing=on", "optimizer=adamw_8bit", "max_length=512"]
WAYS: list[tuple[str, dict[str, Any], list[str]]] = [
    ("sft", {}, [*SETTINGS, "adapter.method=qlora"]),
    ("sft", {"activation_checkpointing": "on", "adapter": {"method": "qlora"}}, [SETTINGS[0], *SETTINGS[2:]]),
    (
        "sft",
        {"precision": "fp32", "optimizer": "adafactor"},
        [*SETTINGS[:2], "precision=auto", SETTINGS[3], "adapter.method=qlora"],
    ),
    ("sft", {"adapter": {"method": "full"}}, [*SETTINGS, "adapter.method=lora", "adapter.method=qlora"]),
    ("sft", {"adapter": {"method": "adalora"}}, SETTINGS),
    (
        "sft",
        {"engine": "zero2"},
        [*SETTINGS[:2], "offload=true", SETTINGS[3]],
    ),  # with which neither 8 bits nor qlora go
    ("sft", {"engine": "fsdp2", "offload": True}, [*SETTINGS[:2], SETTINGS[3], "adapter.method=qlora"]),
    ("pretrain", {"train": "full"}, [*SETTINGS, "train=lora", "adapter.method=qlora"]),
    ("pretrain", {"train": "embeddings"}, SETTINGS),
]


@pytest.mark.parametrize(("name", "settings", "wanted"), WAYS)
def test_memory_remedies_match_the_recipe(name: str, settings: dict[str, Any], wanted: list[str]) -> None:
    recipe = Recipe.model_validate(
        {"name": "a", "base": "b", "prepare": {"dialogues": "d", "documents": "d"}, name: settings}
    )
    found = list(cheaper(recipe, name, 1024, 4096, "auto"))
    assert found == [f"{name}.{setting}" for setting in wanted]


def test_unhelpful_remedy_is_dropped() -> None:
    recipe = Recipe.model_validate({"name": "a", "base": "b", "prepare": {"dialogues": "d"}, "sft": {}})
    seen = list[tuple[str, str, int]]()

    def helps(section: Training, tokens: int) -> bool:
        seen.append((section.activation_checkpointing, section.adapter.method, tokens))
        return section.optimizer != "adamw_8bit"

    found = list(cheaper(recipe, "sft", 1024, 4096, "auto", helps))
    assert "sft.optimizer=adamw_8bit" not in found and seen[0] == ("auto", "lora", 1024)
    assert seen[-1] == ("on", "qlora", 512)


def test_lora_remedy_merges_before_export() -> None:
    settings = {"prepare": {"dialogues": "d"}, "sft": {"adapter": {"method": "full"}}, "export": {}}
    recipe = Recipe.model_validate({"name": "a", "base": "b", **settings})
    assert list(cheaper(recipe, "sft", 9, 9))[-2:] == ["sft.adapter.method=lora merge={}", "sft.adapter.method=qlora"]


def test_remedies_keep_new_vocabulary_rows_trainable() -> None:
    settings = {"prepare": {"documents": "d"}, "vocab": {}, "pretrain": {"train": "full"}}
    recipe = Recipe.model_validate({"name": "a", "base": "b", **settings})
    assert "pretrain.train=lora+embeddings" in list(cheaper(recipe, "pretrain", 9, 9))
