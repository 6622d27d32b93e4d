"""What an adapter is attached to: the shares that learn, and the rows of tokens that the base never trained."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.conftest import tiny_moe
from tongwen.model.adapters.attach import find_untrained_rows, make_trainable
from tongwen.model.loading.architecture import build_on_meta
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


@pytest.mark.parametrize("quantize", [False, True])
def test_plan_counts_the_experts_that_peft_adapts(quantize: bool) -> None:
    """The plan's count comes from shapes; the other is what peft has made of a real mixture."""
    from peft import LoraConfig, get_peft_model

    from tongwen.workflows.training.memory_estimate import TrainingSetup, shape_of

    model = tiny_moe(num_hidden_layers=3)
    chosen = AdapterConfig(rank=4, method="qlora" if quantize else "lora")
    planned = shape_of(model.config, TrainingSetup(chosen, {"lora"}, torch.float32, "cpu"))
    live = get_peft_model(
        model,
        LoraConfig(
            r=4,
            target_modules=ATTENTION,
            target_parameters=["experts.gate_up_proj", "experts.down_proj"],
        ),
    )
    counted = live.get_nb_trainable_parameters()
    assert (planned.trainable, planned.parameters) == counted
    experts = sum(part.numel() for name, part in live.named_parameters() if ".experts." in name and part.requires_grad)
    assert experts > counted[0] / 2  # most of the adapter


def test_resumed_run_keeps_its_original_targets() -> None:
    """As 0.1 chose them for all-linear: a mixture's attention, and no experts."""
    began = {"target_modules": [*ATTENTION], "target_parameters": None}
    kept = make_trainable(tiny_moe(), AdapterConfig(rank=4), [], begun_with=began)
    assert any("targets with which this run began" in notice for notice in kept.notices)
    assert not any(".experts." in name and part.requires_grad for name, part in kept.model.named_parameters())
    config = kept.model.peft_config["default"]
    same = {"target_modules": [*ATTENTION], "target_parameters": ["experts.down_proj", "experts.gate_up_proj"]}
    usual = make_trainable(tiny_moe(), AdapterConfig(rank=4), [], begun_with=same)
    assert set(config.target_modules) == set(ATTENTION) and not config.target_parameters
    assert not any("this run began" in notice for notice in usual.notices)
