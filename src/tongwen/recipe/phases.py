"""The phases of a training section: what each trains, with which settings and learning rates."""

from __future__ import annotations

from typing import NamedTuple

from tongwen.recipe.training import ROWS_ONLY, PhaseConfig, Prefer, Pretrain, TrainedPart, Training, parts_of


class TrainingPhase(NamedTuple):
    """One phase of a stage's training.

    train: what it trains, as written in the recipe; parts: the same as separate parts; config: the section with this
    phase's settings; learning_rate and embedding_learning_rate: peak rates of the weights and of embeddings.
    """

    train: str
    parts: tuple[TrainedPart, ...]
    config: Training
    learning_rate: float
    embedding_learning_rate: float


def training_phases(section: Training) -> list[TrainingPhase]:
    """Return the section's phases; a section without `phases` has one."""
    phases = section.phases if isinstance(section, Pretrain) else []
    configs = [_config_of(section, phase) for phase in phases] or [section]
    return [
        TrainingPhase(train, parts_of(train), config, *learning_rates(config, train))
        for train, config in zip(section.trains, configs, strict=True)
    ]


def learning_rates(section: Training, train: str) -> tuple[float, float]:
    """Return the peak learning rates of (weights, embeddings) when training `train`."""
    default = 5e-6 if isinstance(section, Prefer) else 2e-5 if train == "full" else 2e-4
    rate = section.learning_rate if section.learning_rate is not None else default
    if not isinstance(section, Pretrain):
        return rate, rate
    if section.embedding_learning_rate is None:
        return rate, rate / 5 if train == "lora+embeddings" else rate
    return section.embedding_learning_rate if train in ROWS_ONLY else rate, section.embedding_learning_rate


def _config_of(section: Training, phase: PhaseConfig) -> Training:
    """Return the section with the phase's own settings."""
    settings = {name: getattr(phase, name) for name in PhaseConfig.model_fields if name != "train"}
    if phase.learning_rate is not None and phase.train in ROWS_ONLY:
        settings["embedding_learning_rate"] = phase.embedding_learning_rate or phase.learning_rate
    return section.model_copy(update={name: value for name, value in settings.items() if value is not None})
