"""The trainable shares that Chinese-LLaMA-Alpaca published for 7B, from shapes alone."""

from __future__ import annotations

from typing import Any

import pytest

from tongwen.model.adapters.attach import adapt
from tongwen.model.loading.load import make_skeleton
from tongwen.recipe.training import AdapterConfig

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
SHARES = {
    "PT-1": (49953, AdapterConfig(), {"embeddings"}, 2.972),
    "PT-2": (49953, AdapterConfig(rank=8, targets=ATTENTION), {"lora", "embeddings"}, 6.058),
    "SFT": (
        49954,
        AdapterConfig(rank=8, targets="all-linear", also_train=["embed_tokens", "lm_head"]),
        {"lora"},
        6.216,
    ),
}


@pytest.mark.parametrize("stage", SHARES)
def test_trainable_shares_of_7b(stage: str) -> None:
    from transformers import LlamaConfig

    rows, choice, trained, wanted = SHARES[stage]
    model: Any = make_skeleton(LlamaConfig(vocab_size=rows))
    adapted = adapt(model, choice, [], trained=trained)  # type: ignore[arg-type]
    learns, of = adapted.counts["parameters"], adapted.counts["of"]
    if stage == "PT-1":  # the published figure is of the embedding alone; here the head learns with it
        learns -= model.get_output_embeddings().weight.numel()
    assert round(100 * learns / of, 3) == wanted
