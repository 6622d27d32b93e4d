"""The rules of the sections that train."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.recipe.reading import PRETRAIN, SFT, check_problem


@pytest.mark.parametrize(
    ("text", "line", "value", "remedy"),
    [
        (SFT % "adapter: {targets: q_proj}", 4, "q_proj", "all-linear"),
        (SFT % "adapter: {targets: []}", 4, "targets", "all-linear"),
        (SFT % "adapter: {method: full, also_train: [norm]}", 4, "also_train", "method: lora"),
        (SFT % "adapter: {method: new_rows, continue_from: f}", 4, "continue_from", "method: lora"),
        (SFT % "adapter: {target_parameters: [w], dora: true}", 4, "target_parameters", "`dora`"),
        (SFT % "adapter: {target_parameters: [w], dropout: 0.1}", 4, "target_parameters", "`dropout`"),
        (SFT % "adapter: {method: qlora, quantize: int8, dora: true}", 4, "dora", "quantize: nf4"),
        (SFT % "decay: 0.1", 4, "decay", "schedule: wsd"),
        (SFT % "optimizer: muon, adapter: {method: full}", 4, "muon", "optimizer: adamw"),
        (
            SFT % "engine: zero4",
            4,
            "'zero4'",
            "is neither one of auto, ddp, fsdp2, zero2, zero3 nor a .json or .yaml file",
        ),
        (SFT % "engine: ddp, offload: true", 4, "`offload` needs an engine that shards", "fsdp2"),
        (SFT % "engine: fsdp2, optimizer: muon", 4, "`optimizer: muon` does not work with `engine: fsdp2`", "adamw"),
        (SFT % "engine: zero2, adapter: {method: adalora}", 4, "`method: adalora` does not work", "method: lora"),
        (SFT % "engine: zero3, adapter: {method: qlora}", 4, "method: qlora", "`engine: fsdp2`"),
        (SFT % "engine: fsdp2, adapter: {method: qlora, quantize: int8}", 4, "quantize: int8", "`quantize: nf4`"),
        (PRETRAIN % "optimizer: muon, train: new_rows", 4, "new_rows", "optimizer: adamw"),
        (
            PRETRAIN % "optimizer: muon, phases: [{train: lora}, {train: lora+embeddings}]",
            4,
            "lora+embeddings",
            "adamw",
        ),
        (PRETRAIN % "train: full, adapter: {method: qlora}", 4, "qlora", "train: lora"),
        (PRETRAIN % "phases: [{train: embeddings}], adapter: {method: qlora}", 4, "train: embeddings", "train: lora"),
        (PRETRAIN % "train: full, adapter: {continue_from: f}", 4, "continue_from", "tongwen merge"),
        (PRETRAIN % "forgetting: {stop: 0.1}", 4, "`forgetting: {stop: ...}`", "evaluate_every: 50"),
        (PRETRAIN % "embedding_learning_rate: 1e-4", 4, "embedding_learning_rate", "train: lora+embeddings"),
        (
            PRETRAIN % "phases: [{train: lora, embedding_learning_rate: 1e-4}, {train: new_rows}]",
            4,
            "embedding_learning_rate",
            "train: lora+embeddings",
        ),
    ],
)
def test_each_problem_names_line_value_and_remedy(
    text: str, line: int, value: str, remedy: str, tmp_path: Path
) -> None:
    check_problem(tmp_path, text, line, value, remedy)


def test_training_rules_are_checked_before_pretraining_rules(tmp_path: Path) -> None:
    both = "patience: 2, embedding_learning_rate: 1e-4"
    check_problem(tmp_path, PRETRAIN % both, 4, "`patience`", "evaluate_every: 50")
