"""Which settings decide a training's result, and which have no effect."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tongwen.recipe.effects import deciding_settings, free_settings, unused_adapter_settings, unused_settings
from tongwen.recipe.training import AdapterConfig, Pretrain, Sft, Training

EVERY = {*AdapterConfig.model_fields}


@pytest.mark.parametrize(
    ("section", "decides"),
    [
        (Sft.model_validate({"evaluate_every": 10}), False),
        (Sft.model_validate({"evaluate_every": 10, "patience": 2}), True),
        (Pretrain.model_validate({"evaluate_every": 10}), False),
        (Pretrain.model_validate({"evaluate_every": 10, "forgetting": {"stop": 0.1}}), True),
    ],
)
def test_evaluate_every_decides_only_with_early_stopping(section: Training, decides: bool) -> None:
    assert ("evaluate_every" in deciding_settings(section)) == decides
    assert ("evaluate_every" not in free_settings(section)) == decides
    assert "save_every" in free_settings(section) and "save_every" not in deciding_settings(section)


def test_engine_file_contents_are_deciding_settings(tmp_path: Path) -> None:
    file = tmp_path / "engine.json"
    file.write_text(json.dumps({"steps_per_print": 5, "zero_optimization": {"stage": 2, "overlap_comm": True}}))
    settings = deciding_settings(Sft.model_validate({"engine": str(file)}))
    assert settings["engine_file"] == {"stage": 2}
    assert "engine_file" not in deciding_settings(Sft.model_validate({"engine": "zero2"}))


@pytest.mark.parametrize(
    ("model", "settings", "unused"),
    [
        (Sft, {}, {"decay"}),
        (Sft, {"schedule": "wsd"}, set()),
        (Sft, {"schedule": "wsd", "batch_tokens": 400}, {"batch_size"}),
        (Pretrain, {"schedule": "wsd"}, set()),
        (Pretrain, {"schedule": "wsd", "phases": [{"train": "lora"}]}, {"train"}),
    ],
)
def test_unused_settings_are_found(model: type[Training], settings: dict[str, Any], unused: set[str]) -> None:
    assert unused_settings(model.model_validate(settings)) == unused


@pytest.mark.parametrize(
    ("model", "settings", "unused"),
    [
        (Sft, {}, {"quantize"}),
        (Sft, {"adapter": {"method": "qlora"}}, set()),
        (Sft, {"adapter": {"method": "full"}}, EVERY - {"method"}),
        (Sft, {"adapter": {"continue_from": "f"}}, EVERY - {"method", "continue_from"}),
        (Sft, {"adapter": {"method": "qlora", "continue_from": "f"}}, EVERY - {"method", "quantize", "continue_from"}),
        (Pretrain, {"train": "full"}, EVERY),
        (Pretrain, {"train": "lora+embeddings"}, {"quantize"}),
    ],
)
def test_unused_adapter_settings_are_found(model: type[Training], settings: dict[str, Any], unused: set[str]) -> None:
    assert unused_adapter_settings(model.model_validate(settings)) == unused
