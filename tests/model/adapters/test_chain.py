"""A chain of adapters that is opened to talk answers as peft's live layers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.adapters import live_logits, logits, make_adapter
from tests.conftest import tiny_llama
from tongwen.core.errors import ModelError
from tongwen.model.adapters.chain import open_adapter_chain
from tongwen.model.loading.model_ref import ModelRef


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["lm_head"]},
        {"target_modules": ["embed_tokens", "q_proj"]},
        {"target_modules": ["embed_tokens"], "ensure_weight_tying": True},
        {"target_modules": ["q_proj"], "trainable_token_indices": {"lm_head": [1, 5]}},
        {"target_modules": ["q_proj"], "trainable_token_indices": [1, 5]},
    ],
)
def test_tied_base_matches_live_layers(options: dict[str, Any], tmp_path: Path) -> None:
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    tiny_llama(base, 90)
    make_adapter(base, adapter, **options)
    model, _fingerprint = open_adapter_chain(ModelRef("", str(base), adapters=(str(adapter),)), torch.float32)
    assert torch.allclose(logits(model), live_logits(base, adapter), atol=1e-5)


def test_unmergeable_adapter_is_refused(tmp_path: Path) -> None:
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    tiny_llama(base, 90)
    make_adapter(base, adapter, target_modules=["q_proj"])
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "alora_invocation_tokens": [3]}))
    with pytest.raises(ModelError, match="alora_invocation_tokens"):
        open_adapter_chain(ModelRef("", str(base), adapters=(str(adapter),)), torch.float32)
