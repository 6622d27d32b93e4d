"""Every field of an adapter's config is read, changes nothing, or is refused by its name; targets are those of peft."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists

from tongwen.core.errors import ModelError
from tongwen.model.adapters.config import CHANGES_BASE, IDLE, READ, STARTS, is_target, read_config

PLAIN = {"peft_type": "LORA", "r": 4, "lora_alpha": 8}


def read(folder: Path, **fields: Any) -> dict[str, Any]:
    (folder / "adapter_config.json").write_text(json.dumps({**PLAIN, **fields}))
    return read_config(folder)


def test_every_lora_field_is_read_ignored_or_refused(tmp_path: Path) -> None:
    LoraConfig(r=4, target_modules=["q_proj"]).save_pretrained(str(tmp_path))
    assert read_config(tmp_path)["r"] == 4, "a plain config, with all defaults"
    fields = {field.name for field in dataclasses.fields(LoraConfig)}
    assert {"layer_replication", "alora_invocation_tokens", "use_qalora", "kasa_config"} <= fields - READ - IDLE
    for name in [*sorted(fields - READ - IDLE), "a_field_of_2027"]:
        for value in (None, False, [], {}, ""):
            read(tmp_path, **{name: value})
        for value in (True, [[0, 2]], {"size": 1}, "yes", 3):
            with pytest.raises(ModelError, match=name):
                read(tmp_path, **{name: value})


def test_init_that_changed_the_base_is_refused(tmp_path: Path) -> None:
    for start in (*STARTS, *CHANGES_BASE):
        read(tmp_path, init_lora_weights=start)
    for start in ("pissa_niter_4", "corda", "loftq", "lora_ga", "a start of 2027"):
        with pytest.raises(ModelError, match=f"init_lora_weights is '{start}'"):
            read(tmp_path, init_lora_weights=start)


@pytest.mark.parametrize(
    "fields", [{"r": True}, {"r": 0}, {"lora_alpha": "8"}, {"peft_type": "OFT"}, {"peft_type": None}]
)
def test_non_lora_config_is_refused(fields: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(Exception, match=str(next(iter(fields.values())))):
        read(tmp_path, **fields)


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": ["q_proj"]},
        {"target_modules": ["0.self_attn.q_proj", "lm_head"]},
        {"target_modules": r".*layers\.1\..*(q|up)_proj"},
        {"target_modules": ["q_proj", "up_proj"], "exclude_modules": ["layers.1.mlp.up_proj"]},
        {"target_modules": ["q_proj", "up_proj"], "exclude_modules": r".*1.*"},
        {"target_modules": ["q_proj", "up_proj"], "modules_to_save": ["mlp"]},
        {"target_modules": ["q_proj"], "layers_to_transform": [1]},
        {"target_modules": ["q_proj", "experts.1.up_proj"], "layers_to_transform": 1, "layers_pattern": "layers"},
        {"target_modules": ["q_proj"], "layers_to_transform": [0], "layers_pattern": ["blocks"]},
        {"target_modules": ["lm_head"], "layers_to_transform": []},
    ],
)
def test_targets_match_peft(fields: dict[str, Any]) -> None:
    names = ["lm_head", "model.embed_tokens"]
    for layer in (0, 1, 11):
        names += [
            f"model.layers.{layer}.{name}" for name in ("self_attn.q_proj", "mlp.up_proj", "mlp.experts.1.up_proj")
        ]
    config = LoraConfig(**fields)
    for name in names:
        expected = check_target_module_exists(config, name)
        assert is_target(fields, name) is (bool(expected) and type(expected).__name__ != "_ExcludedModule"), name
