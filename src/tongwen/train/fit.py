"""One training run on transformers' Trainer, which keeps optimizer, schedule, accumulation, ranks and resume.

What differs here: the batches come from a plan (no padding, no sampler), the loss is summed over learned tokens and
divided by all learned tokens of the optimizer step over all ranks, a checkpoint is committed by a rename after its
bytes are on the disk, and a NaN stops the run.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, SequentialSampler
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from tongwen import artifact, console
from tongwen.errors import ArtifactError, NumbersError
from tongwen.language import say
from tongwen.recipe.schema import Sft
from tongwen.train.audit import FirstSteps, Loss, check_finite_gradients
from tongwen.train.batches import MicroBatches, Plan
from tongwen.train.memory import keep_freed_memory
from tongwen.train.watch import Watch

DIGESTS = "digests.json"


@dataclass
class Job:
    """Everything that a run needs. `loss` gives (sum of nats, nats per learned token) of a micro-batch."""

    model: Any
    tokenizer: Any
    store: Any
    plan: Plan
    packed: bool
    section: Sft
    dtype: torch.dtype
    seed: int
    checkpoints: Path
    resume: Path | None
    loss: Loss
    evaluate: Callable[[], dict[str, float]] | None
    watch: Watch
    checkpointing: bool = False


def fit(job: Job) -> None:
    """Train to the end, from the checkpoint if there is one. Raises NumbersError on NaN or a failed audit."""
    if not torch.accelerator.is_available():
        keep_freed_memory()
    trainer = PlannedTrainer(job)
    trainer.remove_callback(PrinterCallback)
    for callback in (job.watch, FirstSteps(), NoNan(job), Evaluations(job)):
        trainer.add_callback(callback)
    trainer.train(resume_from_checkpoint=str(job.resume) if job.resume else None)
    for name, part in job.model.named_parameters():
        if part.requires_grad and not bool(torch.isfinite(part).all()):
            raise NumbersError(say("weights are not finite after the run", "训练后权重含非有限值"), place=name)


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint whose every file has the digest that was recorded; damaged ones are put aside, aloud."""
    for path in sorted(folder.glob("checkpoint-*"), key=step_of, reverse=True):
        problem = damage(path)
        if problem is None:
            return path
        aside = path.with_name(f"damaged-{path.name}")
        shutil.rmtree(aside, ignore_errors=True)
        path.rename(aside)
        console.notice(
            say(
                f"{path.name} is damaged ({problem}); put aside as {aside.name}",
                f"{path.name} 已损坏（{problem}），改名为 {aside.name}",
            )
        )
    return None


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint: a missing or changed file; None when it is whole."""
    try:
        digests = json.loads((checkpoint / DIGESTS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return say(f"no readable {DIGESTS}", f"{DIGESTS} 不可读")
    for name, digest in digests.items():
        file = checkpoint / name
        if not file.is_file():
            return say(f"{name} is missing", f"缺少 {name}")
        if artifact.hash_file(file) != digest:
            return say(f"{name} has changed", f"{name} 已改变")
    return None


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.rsplit("-", 1)[1])


def training_arguments(job: Job) -> TrainingArguments:
    """The recipe's words as TrainingArguments; `trainer:` goes through as it is."""
    section, plan = job.section, job.plan
    total = len(plan)
    warmup = round(section.warmup * total) if section.warmup < 1 else int(section.warmup)
    shape = {"constant": "constant_with_warmup"}.get(section.schedule, section.schedule)
    ours: dict[str, Any] = {
        "output_dir": str(job.checkpoints),
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": plan.accumulate,
        "max_steps": total,
        "learning_rate": section.peak_learning_rate,
        "lr_scheduler_type": shape,
        "warmup_steps": warmup,
        "weight_decay": section.weight_decay,
        "max_grad_norm": section.max_grad_norm,
        "bf16": job.dtype == torch.bfloat16,
        "logging_steps": section.log_every,
        "logging_first_step": True,
        "logging_nan_inf_filter": False,
        "save_strategy": "steps",
        "save_steps": section.save_every,
        "eval_strategy": "no",
        "seed": job.seed,
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "ddp_find_unused_parameters": False,
        "dataloader_pin_memory": torch.accelerator.is_available(),
        "log_level": "error",
        "use_cpu": not torch.accelerator.is_available(),  # said aloud: without it a CPU run under torchrun stays alone
        "report_to": "none",
    }
    if job.checkpointing:
        ours |= {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
    arguments = TrainingArguments(**ours | section.trainer)  # the recipe has refused what it says in its own words
    arguments._n_gpu = min(arguments.n_gpu, 1)  # one process, one GPU: DataParallel would cut a pack in two (F-06)
    return arguments


class PlannedTrainer(Trainer):
    """Trainer over a Plan."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.micro = MicroBatches(job.store, job.plan.flat(), packed=job.packed)
        self._staging: Path | None = None
        super().__init__(
            model=job.model,
            args=training_arguments(job),
            train_dataset=self.micro,
            processing_class=job.tokenizer,
        )
        self.model_accepts_loss_kwargs = True  # the loss below is already scaled over the accumulation

    def get_train_dataloader(self) -> DataLoader:
        """The plan's micro-batches in their order; accelerate deals them to the ranks one by one."""
        loader = DataLoader(self.micro, batch_size=1, sampler=SequentialSampler(self.micro), collate_fn=_only)
        return self.accelerator.prepare(loader)

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Any]], device: torch.device) -> torch.Tensor:
        """Learned tokens of the whole optimizer step, over its micro-batches and all ranks."""
        count = torch.tensor(sum(batch["learned"] for batch in batch_samples), device=device)
        return self.accelerator.gather(count).sum() if self.args.world_size > 1 else count

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        total, _ = self.job.loss(model, inputs)
        # DDP averages the ranks' gradients, so each rank's part of the mean is multiplied by their number.
        return total * self.args.world_size / num_items_in_batch

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        optimizer = super().create_optimizer(*args, **kwargs)
        inside = {id(part) for group in optimizer.param_groups for part in group["params"]}
        lost = [
            name for name, part in self.job.model.named_parameters() if part.requires_grad and id(part) not in inside
        ]
        if lost or not inside:
            raise NumbersError(
                say(f"{len(lost)} trainable tensors are not in the optimizer", f"{len(lost)} 个可训练张量不在优化器中"),
                place=lost[0] if lost else "optimizer",
            )
        return optimizer

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._staging or self.args.output_dir)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Stage, bring to the disk, record digests, rename: a checkpoint is whole or it is not there."""
        folder = Path(self.args.output_dir)
        self._staging = folder / "staging"
        if self.args.should_save:
            shutil.rmtree(self._staging, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        try:
            super()._save_checkpoint(model, trial)
        finally:
            staged, self._staging = self._staging / f"checkpoint-{self.state.global_step}", None
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            check_adapter_saved(staged)
            commit(staged, folder, self.job.section.keep_checkpoints)
        self.accelerator.wait_for_everyone()


def commit(staged: Path, folder: Path, keep: int) -> None:
    """Make a staged checkpoint the newest, then drop the oldest beyond `keep`."""
    digests = {
        str(file.relative_to(staged)): artifact.hash_file(file) for file in sorted(staged.rglob("*")) if file.is_file()
    }
    artifact.sync_tree(staged)
    artifact.write_json(staged / DIGESTS, digests)
    target = folder / staged.name
    if target.exists():
        shutil.rmtree(target)
    staged.rename(target)
    artifact.sync_folder(folder)
    shutil.rmtree(staged.parent, ignore_errors=True)
    for old in sorted(folder.glob("checkpoint-*"), key=step_of, reverse=True)[keep:]:
        (old / DIGESTS).unlink(missing_ok=True)  # first it stops being a checkpoint, then it goes
        shutil.rmtree(old)


def check_adapter_saved(folder: Path) -> None:
    """Raise ArtifactError when an adapter file holds no tensors (443 bytes in 2023), or there is none."""
    file = folder / "adapter_model.safetensors"
    if not (folder / "adapter_config.json").is_file():
        return
    from safetensors import safe_open

    if not file.is_file():
        raise ArtifactError(say("the adapter was saved without weights", "保存的适配器没有权重"), place=str(folder))
    with safe_open(str(file), "pt") as tensors:
        names = list(tensors.keys())
    if not names:
        raise ArtifactError(say("the saved adapter is empty", "保存的适配器为空"), place=str(file))


class Evaluations(TrainerCallback):
    """Scores the held-out set every `evaluate_every` steps, without disturbing the run's random numbers."""

    def __init__(self, job: Job) -> None:
        self.job = job

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        every = self.job.section.evaluate_every
        if not (every and self.job.evaluate and state.global_step % every == 0):
            return
        with torch.random.fork_rng():
            scores = self.job.evaluate()
        self.job.watch.on_scores(scores)


class NoNan(TrainerCallback):
    """Before each optimizer step: every gradient is finite, or the run stops and says where."""

    def __init__(self, job: Job) -> None:
        self.job = job

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        check_finite_gradients(model, state.global_step + 1, self._rows(state.global_step))

    def _rows(self, step: int) -> str:
        origins = [str(self.job.store.origin(sample)) for sample in self.job.plan.steps[step][:8]]
        return ", ".join(origins)


def _only(batch: list[dict[str, Any]]) -> dict[str, Any]:
    return batch[0]
