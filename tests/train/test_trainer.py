"""The private methods of transformers' Trainer that PlannedTrainer overrides still exist, with the same signatures."""

from __future__ import annotations

import inspect

import pytest
from transformers import Trainer

from tongwen.train.trainer import PlannedTrainer

# Parameters behind `self`, as transformers 5.17 to 5.18 has them.
OVERRIDDEN = {
    "_prepare_for_training": None,  # passed through as they come
    "_get_num_items_in_batch": ["batch_samples", "device"],
    "_track_num_input_tokens": ["inputs"],
    "_get_grad_norm": ["model", "grad_norm"],
    "_load_from_checkpoint": ["resume_from_checkpoint", "model"],
    "_load_optimizer_and_scheduler": ["checkpoint"],
    "_get_output_dir": ["trial"],
    "_save_checkpoint": ["model", "trial"],
}


@pytest.mark.parametrize("name", OVERRIDDEN)
def test_overridden_private_method_keeps_its_signature(name: str) -> None:
    method = getattr(Trainer, name)
    if (parameters := OVERRIDDEN[name]) is not None:
        assert list(inspect.signature(method).parameters)[1:] == parameters


def test_list_of_overridden_methods_is_complete() -> None:
    ours = {name for name in vars(PlannedTrainer) if name.startswith("_") and not name.startswith("__")}
    assert {name for name in ours if hasattr(Trainer, name)} == {*OVERRIDDEN}
    assert all(name in (PlannedTrainer.__doc__ or "") for name in OVERRIDDEN)
