"""Each phase has its own settings and learning rates, and takes the rest from its section."""

from __future__ import annotations

from typing import Any

import pytest

from tongwen.recipe.phases import training_phases
from tongwen.recipe.training import Pretrain, Sft


@pytest.mark.parametrize(
    ("settings", "rates"),
    [
        ({}, [(2e-4, 2e-4)]),
        ({"train": "full"}, [(2e-5, 2e-5)]),
        ({"train": "lora+embeddings"}, [(2e-4, 4e-5)]),
        ({"train": "lora+embeddings", "embedding_learning_rate": 1e-5}, [(2e-4, 1e-5)]),
        ({"train": "new_rows", "learning_rate": 1e-3}, [(1e-3, 1e-3)]),
        ({"train": "new_rows", "embedding_learning_rate": 1e-5}, [(1e-5, 1e-5)]),
        # The rate that a phase of rows alone sets for itself wins over the section's rate for embeddings.
        (
            {
                "phases": [{"train": "new_rows", "learning_rate": 1e-3}, {"train": "lora+embeddings"}],
                "embedding_learning_rate": 1e-5,
            },
            [(1e-3, 1e-3), (2e-4, 1e-5)],
        ),
    ],
)
def test_learning_rates_of_weights_and_of_embeddings(settings: dict[str, Any], rates: list[Any]) -> None:
    phases = training_phases(Pretrain.model_validate(settings))
    assert [(phase.learning_rate, phase.embedding_learning_rate) for phase in phases] == [
        pytest.approx(pair) for pair in rates
    ]


def test_phase_inherits_unset_values_from_its_section() -> None:
    section = Pretrain.model_validate(
        {
            "phases": [{"train": "new_rows", "stop_after": "100 steps"}, {"train": "lora+embeddings"}],
            "stop_after": "3 epochs",
        }
    )
    first, second = training_phases(section)
    assert (first.parts, second.parts) == (("new_rows",), ("lora", "embeddings"))
    assert (str(first.config.stop_after), str(second.config.stop_after)) == ("100 steps", "3 epochs")
    assert section.trained_parts == {"new_rows", "lora", "embeddings"}


@pytest.mark.parametrize(
    ("method", "part", "rate"), [("qlora", "lora", 2e-4), ("full", "full", 2e-5), ("new_rows", "new_rows", 2e-4)]
)
def test_sft_is_one_phase(method: str, part: str, rate: float) -> None:
    section = Sft.model_validate({"adapter": {"method": method}})
    (phase,) = training_phases(section)
    assert (phase.train, phase.parts, phase.config) == (part, (part,), section)
    assert (phase.learning_rate, phase.embedding_learning_rate) == (rate, rate)
