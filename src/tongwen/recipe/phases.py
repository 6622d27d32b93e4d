"""The phases of a training section, in order: what each trains, with which settings and learning rates."""

from __future__ import annotations

from typing import NamedTuple

from tongwen.recipe.training import ROWS_ONLY, PhaseConfig, Pretrain, TrainedPart, Training, parts_of


class TrainingPhase(NamedTuple):
    """One phase of a stage's training.

    train: what it trains, as the recipe writes it; parts: the same, taken apart; config: the section with the settings of
    this phase; learning_rate and embedding_learning_rate: the peaks for the weights and for embeddings.
    """

    train: str
    parts: tuple[TrainedPart, ...]
    config: Training
    learning_rate: float
    embedding_learning_rate: float


def training_phases(section: Training) -> list[TrainingPhase]:
    """The section's phases; a section without `phases` is one."""
    phases = section.phases if isinstance(section, Pretrain) else []
    configs = [_config_of(section, phase) for phase in phases] or [section]
    return [
        TrainingPhase(train, parts_of(train), config, *learning_rates(config, train))
        for train, config in zip(section.trains, configs, strict=True)
    ]


def learning_rates(section: Training, train: str) -> tuple[float, float]:
    """Peak learning rates where `train` is trained: of the weights, and of embeddings."""
    default = 2e-5 if train == "full" else 2e-4
    rate = section.learning_rate if section.learning_rate is not None else default
    if not isinstance(section, Pretrain):
        return rate, rate
    if section.embedding_learning_rate is None:
        return rate, rate / 5 if train == "lora+embeddings" else rate
    return section.embedding_learning_rate if train in ROWS_ONLY else rate, section.embedding_learning_rate


def _config_of(section: Training, phase: PhaseConfig) -> Training:
    """The section with what the phase sets itself."""
    settings = {name: getattr(phase, name) for name in PhaseConfig.model_fields if name != "train"}
    if phase.learning_rate is not None and phase.train in ROWS_ONLY:
        settings["embedding_learning_rate"] = phase.embedding_learning_rate or phase.learning_rate
    return section.model_copy(update={name: value for name, value in settings.items() if value is not None})
