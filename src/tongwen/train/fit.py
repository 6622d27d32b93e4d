"""One training run on transformers' Trainer, which keeps optimizer, schedule, accumulation, ranks and resume.

What differs here: the batches come from a plan (no padding, no sampler), the loss is summed over learned tokens and
divided by all learned tokens of the optimizer step over all ranks, a checkpoint is committed by a rename after its
bytes are on the disk, and a NaN stops the run.
"""

from __future__ import annotations

import importlib.util
import math
import shutil
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch.utils.data import DataLoader, SequentialSampler
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.integrations.deepspeed import deepspeed_load_checkpoint

from tongwen import console
from tongwen.errors import MissingPackage, NumbersError, RecipeError
from tongwen.language import say
from tongwen.recipe.schema import Stretch
from tongwen.train.audit import FirstSteps, Loss, broken_gradients, check_finite_gradients, is_broken
from tongwen.train.batches import MicroBatches, Plan
from tongwen.train.checkpoints import check_adapter_saved, commit, step_of
from tongwen.train.engine import Engine, are_somewhere
from tongwen.train.memory import keep_freed_memory
from tongwen.train.noise import Noise
from tongwen.train.watch import Watch

OPTIMIZERS = {
    "adamw": "adamw_torch_fused",
    "adamw_8bit": "adamw_8bit",
    "paged_adamw_8bit": "paged_adamw_8bit",
    "adafactor": "adafactor",
}
SCHEDULES = {
    "constant": "constant_with_warmup",
    "linear": "linear",
    "cosine": "cosine",
    "wsd": "warmup_stable_decay",
    "warmup_lr": "constant_with_warmup",  # with another warm-up: see create_scheduler
}


class Budget(Protocol):
    """What a method needs beyond loss and gradient (AdaLoRA): a second loss, a step of its own, and a memory."""

    def penalty(self) -> torch.Tensor: ...
    def spend(self, step: int) -> None: ...
    def save(self, folder: Path) -> None: ...
    def load(self, folder: Path) -> None: ...


@dataclass
class Job:
    """Everything that a run needs.

    loss:       gives (sum of nats, nats per learned token) of a micro-batch
    embeddings: tensors that learn at the stretch's embedding rate
    guarded:    those of them whose gradient is zero on most rows; nothing but the gradient may move them
    """

    model: Any
    tokenizer: Any
    store: Any
    plan: Plan
    packed: bool
    stretch: Stretch
    dtype: torch.dtype
    seed: int
    checkpoints: Path
    resume: Path | None
    loss: Loss
    evaluate: Callable[[], dict[str, Any]] | None
    watch: Watch
    engine: Engine
    checkpointing: bool = False
    embeddings: Sequence[torch.nn.Parameter] = ()
    guarded: Sequence[torch.nn.Parameter] = ()
    budget: Budget | None = None

    def place_of(self, done: int) -> tuple[int, str]:
        """(number of the step after so many, the first of its rows), for messages."""
        rows = ", ".join(str(self.store.origin(sample)) for sample in self.plan.steps[done][:8])
        return self.watch.before_steps + done + 1, rows


def fit(job: Job) -> int:
    """Train to the end, from the checkpoint if there is one; returns the steps taken in all. Raises NumbersError on NaN or
    a failed audit."""
    if not torch.accelerator.is_available():
        keep_freed_memory()
    trainer = PlannedTrainer(job)
    trainer.remove_callback(PrinterCallback)
    for callback in (job.watch, Evaluations(job), Spending(job)):
        trainer.add_callback(callback)
    if not job.engine.is_deepspeed:  # it keeps the gradients to itself: see _get_grad_norm
        trainer.add_callback(FirstSteps())
        trainer.add_callback(NoNan(job))
    start, patience = step_of(job.resume) if job.resume else 0, job.stretch.words.patience
    job.watch.begin(start)
    if start >= len(job.plan) or job.watch.waited(patience):
        trainer._load_from_checkpoint(str(job.resume))
        done = start
    else:
        trainer.train(resume_from_checkpoint=str(job.resume) if job.resume else None)
        done = trainer.state.global_step
    if patience and (best := job.watch.best) and best[0] != done:
        console.notice(say(f"the weights of step {best[0]}, the best, are taken", f"取第 {best[0]} 步（最佳）的权重"))
        trainer._load_from_checkpoint(str(job.checkpoints / f"checkpoint-{best[0]}"))
    learned = {name: part.detach() for name, part in job.model.named_parameters() if part.requires_grad}
    for name, broken in zip(learned, are_somewhere(learned.values(), is_broken), strict=True):
        if broken:
            raise NumbersError(say("weights are not finite after the run", "训练后权重含非有限值"), place=name)
    return done


def steps_of(amount: float, total: int) -> int:
    """A share (below 1) or a number of steps."""
    return round(amount * total) if amount < 1 else int(amount)


def training_arguments(job: Job) -> TrainingArguments:
    """The recipe's words as TrainingArguments; `trainer:` goes through as it is."""
    section, plan = job.stretch.words, job.plan
    total = len(plan)
    if "8bit" in section.optimizer and importlib.util.find_spec("bitsandbytes") is None:
        raise MissingPackage("bitsandbytes", f"optimizer: {section.optimizer}", "qlora")
    ours: dict[str, Any] = {
        "output_dir": str(job.checkpoints),
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": plan.accumulate,
        "max_steps": total,
        "learning_rate": job.stretch.rate,
        "optim": OPTIMIZERS.get(section.optimizer, "adamw_torch_fused"),
        "lr_scheduler_type": SCHEDULES[section.schedule],
        "warmup_steps": steps_of(section.warmup, total),
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
    if section.schedule == "wsd":
        ours["lr_scheduler_kwargs"] = {"num_decay_steps": max(1, steps_of(section.decay, total))}
    if job.checkpointing:
        ours |= {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
    arguments = TrainingArguments(
        **ours | job.engine.arguments | section.trainer
    )  # the recipe has refused what it says in its own words
    arguments._n_gpu = min(arguments.n_gpu, 1)  # one process, one GPU: DataParallel would cut a pack in two (F-06)
    return arguments


class PlannedTrainer(Trainer):
    """Trainer over a Plan."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.micro = MicroBatches(job.store, job.plan.flat(), packed=job.packed)
        self._staging: Path | None = None
        self.noise = Noise(job.model, job.stretch.words.neftune) if job.stretch.words.neftune else None
        super().__init__(
            model=job.model,
            args=training_arguments(job),
            train_dataset=self.micro,
            processing_class=job.tokenizer,
            optimizer_cls_and_kwargs=_muon(job) if job.stretch.words.optimizer == "muon" else None,
        )
        self.model_accepts_loss_kwargs = True  # the loss below is already scaled over the accumulation

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        self.job.engine.insist(self.accelerator)
        self.is_fsdp_enabled = self.accelerator.is_fsdp2

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> tuple[Any, DataLoader]:
        prepared: tuple[Any, DataLoader] = super()._prepare_for_training(*args, **kwargs)
        self.job.engine.prove(self.model_wrapped, self.model, self.optimizer)
        return prepared

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        if self.job.engine.is_deepspeed and not math.isfinite(
            norm
        ):  # it has stepped already, and nothing is saved of it
            raise broken_gradients([say("all together", "合计")], *self.job.place_of(self.state.global_step))
        return norm

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
        with self.noise.scaled_for(inputs) if self.noise else nullcontext():
            total, _ = self.job.loss(model, inputs)
        # DDP averages the ranks' gradients, so each rank's part of the mean is multiplied by their number.
        mean = total * self.args.world_size / num_items_in_batch
        if self.job.budget:
            mean = mean + self.job.budget.penalty() / self.job.plan.accumulate
        return mean

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        optimizer = super().create_optimizer(*args, **kwargs)
        self._set_embeddings_apart(optimizer)
        inside = {id(part) for group in optimizer.param_groups for part in group["params"]}
        lost = [
            name for name, part in self.job.model.named_parameters() if part.requires_grad and id(part) not in inside
        ]
        if lost or not inside:
            raise NumbersError(
                say(f"{len(lost)} trainable tensors are not in the optimizer", f"{len(lost)} 个可训练张量不在优化器中"),
                place=lost[0] if lost else "optimizer",
            )
        self._held = [list(group["params"]) for group in optimizer.param_groups]
        return optimizer

    def _set_embeddings_apart(self, optimizer: torch.optim.Optimizer) -> None:
        """A group of their own with their own rate. Weight decay would move rows that have no gradient."""
        apart, guarded = {id(part) for part in self.job.embeddings}, {id(part) for part in self.job.guarded}
        for group in list(optimizer.param_groups):
            for chosen in (guarded, apart - guarded):
                mine = [part for part in group["params"] if id(part) in chosen]
                if not mine:
                    continue
                group["params"] = [part for part in group["params"] if id(part) not in chosen]
                decay = 0.0 if chosen is guarded else group["weight_decay"]
                rate = self.job.stretch.embedding_rate
                optimizer.add_param_group({**group, "params": mine, "lr": rate, "weight_decay": decay})

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        if self.job.engine.name == "fsdp2":
            # accelerate finds the shards of an optimizer's parameters by their addresses, and empty shards share one.
            for group, parameters in zip(self.optimizer.param_groups, self._held, strict=True):
                group["params"] = parameters
        if self.job.stretch.words.schedule == "warmup_lr":
            warm = max(2, self.args.get_warmup_steps(num_training_steps))
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
                optimizer or self.optimizer, lambda step: min(1.0, math.log(step + 1) / math.log(warm))
            )
            self._created_lr_scheduler = True
        return super().create_scheduler(num_training_steps, optimizer)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if self.job.budget:
            self.job.budget.load(Path(resume_from_checkpoint))
        elif self.deepspeed:
            deepspeed_load_checkpoint(self.deepspeed, resume_from_checkpoint, load_module_strict=False)
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

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
            if self.job.budget:
                self.job.budget.save(staged)
            words, best = self.job.stretch.words, self.job.watch.best
            commit(staged, folder, words.keep_checkpoints, best[0] if best and words.patience else None)
        self.accelerator.wait_for_everyone()


def _muon(job: Job) -> tuple[Any, dict[str, Any]]:
    """torch's Muon, which orthogonalises the update of a matrix. Raises RecipeError where something else would learn."""
    whole = {id(part) for part in job.embeddings}
    for name, part in job.model.named_parameters():
        if part.requires_grad and (part.dim() != 2 or id(part) in whole or "embed" in name or "lm_head" in name):
            raise RecipeError(
                say(
                    f"muon trains matrices of hidden layers, and {name} {tuple(part.shape)} is none",
                    f"muon 只训练隐藏层矩阵，而 {name} {tuple(part.shape)} 不是",
                ),
                place="optimizer",
                remedy="optimizer: adamw",
            )
    return torch.optim.Muon, {"lr": job.stretch.rate, "weight_decay": job.stretch.words.weight_decay}


class Evaluations(TrainerCallback):
    """Scores the held-out set every `evaluate_every` steps, without disturbing the run's random numbers. With `patience`
    the best one is a checkpoint, and too many without a better one end the run."""

    def __init__(self, job: Job) -> None:
        self.job = job

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        words, watch = self.job.stretch.words, self.job.watch
        every = words.evaluate_every
        if not (every and self.job.evaluate and state.global_step % every == 0):
            return
        with torch.random.fork_rng():
            scores = self.job.evaluate()
        watch.on_scores(state.global_step, scores)
        control.should_log = True
        if words.patience and watch.best:
            control.should_training_stop |= watch.waited(words.patience)
            control.should_save |= control.should_training_stop or watch.best[0] == state.global_step


class Spending(TrainerCallback):
    """Calls the budget's own step, while the gradients are still there."""

    def __init__(self, job: Job) -> None:
        self.job = job

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.job.budget:
            self.job.budget.spend(state.global_step)


class NoNan(TrainerCallback):
    """Before each optimizer step: every gradient is finite, or the run stops and says where."""

    def __init__(self, job: Job) -> None:
        self.job = job

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        check_finite_gradients(model, *self.job.place_of(state.global_step))


def _only(batch: list[dict[str, Any]]) -> dict[str, Any]:
    return batch[0]
