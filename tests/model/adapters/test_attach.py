"""What an adapter is attached to: the shares that learn, and the rows of tokens that the base never trained."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tongwen.model.adapters.attach import find_untrained_rows, make_trainable
from tongwen.model.loading.load import build_on_meta
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
    """As Chinese-LLaMA-Alpaca published them; here from shapes alone."""
    from transformers import LlamaConfig

    rows, choice, trained, wanted = SHARES[stage]
    model: Any = build_on_meta(LlamaConfig(vocab_size=rows))
    adapted = make_trainable(model, choice, [], trained=trained)  # type: ignore[arg-type]
    learns, of = adapted.counts["parameters"], adapted.counts["of"]
    if stage == "PT-1":  # the published figure is of the embedding alone; here the head learns with it
        learns -= model.get_output_embeddings().weight.numel()
    assert round(100 * learns / of, 3) == wanted


@pytest.mark.parametrize(
    ("size", "owned", "wanted"),
    [
        (0.01, range(90), [89]),
        (0.01, (), []),  # nothing is known of the tokenizer
        (0.01, range(100), []),  # a small row that is owned like all others
        (0.01, range(200), []),  # a tokenizer with more ids than rows
        (0.01, {*range(95)} - {7}, [89]),  # ids that were left out in the middle, one of them a trained row
        (0.9, range(90), []),  # padding that looks like what was trained
    ],
)
def test_rows_as_small_as_the_padding_are_untrained(size: float, owned: Any, wanted: list[int]) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=100, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    )
    with torch.no_grad():
        model.lm_head.weight[89:] *= size
    assert find_untrained_rows(model, [5, 89], owned) == wanted
