"""A phase of a training stage."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tongwen.recipe.training import TrainedPart, Training
from tongwen.train.packing import BatchPlan


@dataclass(frozen=True)
class Phase:
    """What a phase trains, with which settings, over which batches.

    train:         what it trains, as in the recipe (`new_rows`, `lora+embeddings`, …); parts: the same, parsed
    config:        the stage's section with this phase's settings
    learning_rate: peak for the weights; embedding_learning_rate: peak for the embeddings
    plan:          its batches
    checkpoints:   the folder of its checkpoints
    steps_before:  optimizer steps of the stage's earlier phases; epochs_before: epochs of those
    """

    train: str
    parts: tuple[TrainedPart, ...]
    config: Training
    learning_rate: float
    embedding_learning_rate: float
    plan: BatchPlan
    checkpoints: Path
    steps_before: int = 0
    epochs_before: float = 0.0

    @property
    def last_step(self) -> int:
        """The step of the stage at which this phase ends."""
        return self.steps_before + len(self.plan)
