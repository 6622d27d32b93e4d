"""The names of TrainingArguments that a recipe knows are those of the installed transformers."""

from __future__ import annotations

from dataclasses import fields

from transformers import TrainingArguments

from tongwen.recipe.aliases import NEEDLESS, OWNED, training_arguments


def test_training_arguments_match_transformers() -> None:
    declared = {field.name for field in fields(TrainingArguments)}
    assert {*training_arguments()} <= declared
    assert len(training_arguments()) > 80
    of_some_releases = {
        "activation_checkpointing_kwargs",
        "group_by_length",
        "gradient_checkpointing",
        "activation_checkpointing",
        "train_sampling_strategy",
        "use_liger_kernel",
    }
    assert {*OWNED, *NEEDLESS} - of_some_releases <= declared, "the recipe owns fields that do not exist"
