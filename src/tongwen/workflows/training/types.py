"""Types that the parts of the training job share: the job itself, and the model that it trains."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from tongwen.core import artifact
from tongwen.core.chat_template import Template
from tongwen.model.adapters.attach import AdaptedModel
from tongwen.recipe.schema import Recipe
from tongwen.recipe.training import Forgetting, Pretrain, Training
from tongwen.train.parallel import Engine, reshard
from tongwen.workflows.record_encoders import RecordEncoder
from tongwen.workflows.stage_inputs import base_of_stage, training_settings
from tongwen.workflows.tokenized_data import TokenizedData


@dataclass(frozen=True)
class SamplePrompt:
    """A prompt that is answered before and after training: its title, its text, and the answer in the data."""

    title: str
    prompt: str
    reference: str


@dataclass(frozen=True)
class TrainingJob:
    """The inputs of one training stage.

    prepared:       the output of `prepare`
    record_encoder: encodes its records; data: the encoded data
    prompts:        answered before and after training, for the report
    find_rows:      returns, for the opened base, the ids whose rows are trained beside the adapter
    new_rows:       the ids that `train: new_rows` trains
    template:       saved with the model, with its stop token
    end:            the id that ends a text, for a base without a stop token for answers
    parents:        further parents of the result, by role; facts: further entries of its manifest
    trainer:        makes the Trainer; None: the usual one
    measure:        (model, tokens of a micro-batch, scores before training or None) -> further scores of the held-out data
    describe:       (scores before, scores after) -> further entries of the report
    """

    recipe: Recipe
    stage: str
    prepared: artifact.Artifact
    record_encoder: RecordEncoder
    data: TokenizedData
    prompts: list[SamplePrompt]
    find_rows: Callable[[Any], list[int]] = lambda model: []
    new_rows: Sequence[int] = ()
    template: Template | None = None
    end: int | None = None
    parents: dict[str, Any] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    trainer: Any = None
    measure: Callable[[PreparedModel, int, dict[str, Any] | None], dict[str, Any]] = lambda model, budget, before: {}
    describe: Callable[[dict[str, Any], dict[str, Any]], dict[str, Any]] = lambda before, after: {}

    @property
    def section(self) -> Training:
        section: Training = getattr(self.recipe, self.stage)
        return section

    @property
    def base(self) -> str:
        return base_of_stage(self.recipe, self.stage)

    @property
    def settings(self) -> dict[str, Any]:
        return training_settings(self.recipe, self.stage)

    @property
    def forgetting(self) -> Forgetting:
        return self.section.forgetting if isinstance(self.section, Pretrain) else Forgetting()

    @property
    def measures_divergence(self) -> bool:
        """Whether the base's own answers are needed."""
        return self.section.keep > 0 or self.forgetting.measures_divergence


@dataclass(frozen=True)
class PreparedModel:
    """The adapted model on its device, with what training and generation need.

    stops: ids that end an answer; packed: whether documents are packed, or padded to batches
    own_attention: the attention that the model was opened with; dtype: the dtype that the Trainer computes in
    """

    adapted: AdaptedModel
    stops: tuple[int, ...]
    packed: bool
    base_fingerprint: str | None
    device: str
    dtype: torch.dtype
    engine: Engine
    own_attention: Any = "sdpa"

    @property
    def model(self) -> Any:
        return self.adapted.model

    @contextmanager
    def computing(self) -> Iterator[None]:
        """Compute in the Trainer's dtype, for work outside the Trainer."""
        with torch.autocast(self.device, self.dtype, enabled=self.dtype != torch.float32):
            yield
        reshard(self.model)
