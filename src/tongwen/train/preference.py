"""Train on preferences: the losses of TRL's trainers, over the batches, checkpoints and guards of `PlannedTrainer`.

The adapter is new, so the model without it is the reference: TRL switches it off and needs no second model. TRL's losses are
means over the items of a micro-batch; each is weighed by its share of the step's items, so that a step does not depend on its
micro-batches. (Only KTO's estimate of the divergence is one of each micro-batch.)
"""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import datasets
import numpy as np
import torch
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer

from tongwen.recipe.training import Prefer
from tongwen.train.packing import BatchPlan, pad
from tongwen.train.parallel import trainable_to_fp32
from tongwen.train.shutdown import ShutdownRequest
from tongwen.train.trainer import PhaseRun, PlannedTrainer, muon_of, training_arguments

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")  # read when trl.experimental is imported
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

NOT_LEARNED = -100


class PreferenceBatches(torch.utils.data.Dataset[dict[str, Any]]):
    """The micro-batches of a plan with the columns that TRL's trainers read.

    `learned` is the number of items. The micro-batch of a rank that has no item holds the first one, counted as none.
    """

    def __init__(self, store: Any, plan: BatchPlan, method: str) -> None:
        self.store, self.method = store, method
        self.micro = plan.flat()
        self.partners = _partners(plan) if method == "kto" else []

    def __len__(self) -> int:
        return len(self.micro)

    def __getitem__(self, index: int) -> dict[str, Any]:
        items = self.micro[index] or (0,)
        batch = _columns(self.store.take(items))
        if self.method == "kto":
            others = self.partners[index] or (0,)
            mismatched = [
                _with_answer(self.store.sample(item), self.store.sample(other))
                for item, other in zip(items, others, strict=True)
            ]
            batch |= {f"KL_{name}": column for name, column in _columns(mismatched).items()}
            batch["label"] = torch.from_numpy(self.store.labels[list(items)])
        elif self.method in ("orpo", "simpo"):
            labels = batch["input_ids"].masked_fill(batch.pop("completion_mask") == 0, NOT_LEARNED)
            batch |= {"labels": labels}
            halves = {name: column.chunk(2) for name, column in batch.items()}
            batch = {
                f"{side}_{name}": half
                for name, both in halves.items()
                for side, half in zip(("chosen", "rejected"), both, strict=True)
            }
        return batch | {"learned": len(self.micro[index])}


def _columns(samples: list[tuple[np.ndarray, np.ndarray]]) -> dict[str, torch.Tensor]:
    """Return (ids, learn) pairs as padded columns."""
    padded = pad(samples)
    completion = torch.zeros_like(padded["input_ids"])
    completion.view(-1)[padded["rows"] + 1] = 1
    return {
        "input_ids": padded["input_ids"],
        "attention_mask": padded["attention_mask"],
        "completion_mask": completion,
    }


def _partners(plan: BatchPlan) -> list[tuple[int, ...]]:
    """Return, for each micro-batch, the items whose answers KTO puts after the prompts: those of the item before in the step."""
    out = []
    for step, micro in zip(plan.steps, plan.micro, strict=True):
        before = dict(zip(step, (step[-1], *step[:-1]), strict=True))
        out += [tuple(before[item] for item in part) for part in micro]
    return out


def _with_answer(
    sample: tuple[np.ndarray, np.ndarray], other: tuple[np.ndarray, np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """Return the prompt of a sample with the answer of another."""
    (ids, learn), (other_ids, other_learn) = sample, other
    begin, other_begin = int(np.argmax(learn)), int(np.argmax(other_learn))
    return (
        np.concatenate([ids[:begin], other_ids[other_begin:]]),
        np.concatenate([learn[:begin], other_learn[other_begin:]]),
    )


class _AsItIs(datasets.Dataset):
    """Stands for the data while TRL's trainers are made, which would tokenise them: ours are tokens already."""

    def map(self, *args: Any, **kwargs: Any) -> Any:
        return self

    def filter(self, *args: Any, **kwargs: Any) -> Any:
        return self


@contextmanager
def _without_warnings() -> Iterator[None]:
    """Hide what TRL's calls make peft and transformers say about names that will change."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


class PreferenceTrainer(PlannedTrainer):
    """What the trainers of all methods share; TRL's trainer follows it in the order of the classes."""

    loss_is_scaled_for_ga = True  # compute_loss below scales it
    config: type[Any]

    def make_micro_batches(self) -> PreferenceBatches:
        return PreferenceBatches(self.job.store, self.job.phase.plan, self.section.method)

    @property
    def section(self) -> Prefer:
        assert isinstance(self.job.phase.config, Prefer)
        return self.job.phase.config

    @property
    def settings(self) -> dict[str, Any]:
        """The settings of TRL's configuration."""
        return {
            "beta": self.section.strength,
            "max_length": self.section.max_length,
            "gradient_checkpointing": False,  # ours is on or off already
        }

    def arguments_of_base(self) -> dict[str, Any]:
        job = self.job
        placeholder = _AsItIs.from_dict({"prompt": [""], "chosen": [""], "rejected": [""], "label": [True]})
        return {
            "model": job.model,
            "args": training_arguments(job, self.config, **self.settings),
            "train_dataset": placeholder,
            "processing_class": copy.deepcopy(job.tokenizer),  # TRL sets its pad token
        }

    def __init__(self, job: PhaseRun, shutdown: ShutdownRequest) -> None:
        configs = (job.model.config.get_text_config(), getattr(job.model, "generation_config", None))
        pads = [getattr(config, "pad_token_id", None) for config in configs]
        with _without_warnings():
            super().__init__(job, shutdown)
        for config, pad_id in zip(configs, pads, strict=True):  # TRL sets these, too
            if config is not None:
                config.pad_token_id = pad_id
        self.processing_class = job.tokenizer
        trainable_to_fp32(job.trainable)  # TRL makes them bf16 on a quantised base
        if "ref" in job.model.peft_config:  # a copy of the adapter, which TRL would need if it had been trained before
            job.model.delete_adapter("ref")
        if self.section.optimizer == "muon":
            self.optimizer_cls_and_kwargs = muon_of(job)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        items = inputs.pop("learned")
        half = self.job.dtype == torch.bfloat16
        with _without_warnings(), torch.autocast(self.args.device.type, torch.bfloat16, enabled=half):
            mean = super(PlannedTrainer, self).compute_loss(model, inputs)  # TRL's
        share = items * mean
        self.guard.note(share, num_items_in_batch)
        return share / num_items_in_batch

    def _send_telemetry(self) -> None:
        """Send nothing: a run does not tell others about itself."""

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write none into the folder of the checkpoints."""


class DpoTrainer(PreferenceTrainer, DPOTrainer):
    config = DPOConfig


class KtoTrainer(PreferenceTrainer, KTOTrainer):
    config = KTOConfig

    @property
    def settings(self) -> dict[str, Any]:
        # TRL would make the mismatched answers within such a batch, and refuses one of 1; ours are made above.
        return {**super().settings, "per_device_train_batch_size": self.section.batch_size}


class OrpoTrainer(PreferenceTrainer, ORPOTrainer):
    config = ORPOConfig

    def concatenated_forward(self, model: Any, batch: dict[str, Any]) -> Any:
        """Take the likelihood of the chosen answers alone, as the paper does; TRL would learn the prompts as well."""
        chosen, rejected, chosen_logits, rejected_logits, _unused, *rest = super().concatenated_forward(model, batch)
        return chosen, rejected, chosen_logits, rejected_logits, -chosen.mean(), *rest


class SimpoTrainer(PreferenceTrainer, CPOTrainer):
    config = CPOConfig

    @property
    def settings(self) -> dict[str, Any]:
        return {**super().settings, "loss_type": "simpo", "simpo_gamma": self.section.margin, "cpo_alpha": 0.0}


TRAINERS = {"dpo": DpoTrainer, "kto": KtoTrainer, "orpo": OrpoTrainer, "simpo": SimpoTrainer}
