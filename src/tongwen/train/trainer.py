"""Train a phase with transformers' Trainer, which handles optimizer, schedule, ranks and resume.

Differences: the batches come from a plan (no padding, no sampler). A batch of the Trainer is a whole optimizer step; its
micro-batches, of which each step has as many as it needs, are accumulated here. The loss is summed over learned tokens and divided by
all learned tokens of the optimizer step over all ranks. A checkpoint is committed by a rename after its bytes are on the
disk. A NaN stops the run before the weights move. A stop signal leads to a checkpoint.
"""

from __future__ import annotations

import importlib.util
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate.utils import is_peft_model
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, SequentialSampler
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.integrations.deepspeed import deepspeed_load_checkpoint

from tongwen.core import artifact, console
from tongwen.core.errors import ArtifactError, Interrupted, MissingPackage, NumbersError, RecipeError, first_line
from tongwen.core.i18n import _
from tongwen.core.stop_signals import on_stop_signals
from tongwen.recipe.training import Training
from tongwen.train.audit import FirstStepsAudit, first_not_finite
from tongwen.train.checkpoints import (
    STAGING,
    check_adapter_saved,
    check_space,
    commit,
    damage,
    describe_last,
    prepare_staging,
    step_of,
)
from tongwen.train.memory import keep_freed_memory
from tongwen.train.metrics import MetricsCallback
from tongwen.train.nan_guard import NanGuard
from tongwen.train.neftune import Neftune
from tongwen.train.packing import MicroBatches, StepBatches
from tongwen.train.parallel import FSDP_FILE, Engine, gather, scatter
from tongwen.train.phase import Phase
from tongwen.train.shutdown import ShutdownRequest
from tongwen.train.trackers import TrackerCallback, TrackerRun

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
    "warmup_lr": "constant_with_warmup",  # with a logarithmic warm-up: see create_scheduler
}


class RankAllocator(Protocol):
    """Interface of AdaLoRA's rank budget: an extra loss term, a step after the optimizer's, and saved state."""

    def penalty(self) -> torch.Tensor: ...
    def update_ranks(self, step: int) -> None: ...
    def save(self, folder: Path) -> None: ...
    def load(self, folder: Path) -> None: ...


@dataclass
class PhaseRun:
    """Inputs for training one phase.

    checkpoint:  to resume from
    loss:        (model, micro-batch, scale) -> (scaled sum of nats, nats per learned token)
    evaluate:    scores the held-out data; its argument is the step of the stage
    learners:    parameters that any phase of the stage trains
    embeddings:  tensors that train at the phase's embedding rate
    guarded:     those of them whose gradient is zero on most rows; they get no weight decay
    allocator:   AdaLoRA's rank budget
    manifest:    metadata of the run for a checkpoint's manifest
    deadline:    when the process must have ended, in seconds since 1970
    evaluations: from the checkpoint's manifest
    tracker:     experiment trackers and their run
    notices:     notices for the report
    trainer:     makes the Trainer; None: PlannedTrainer
    """

    phase: Phase
    model: Any
    tokenizer: Any
    store: Any
    packed: bool
    dtype: torch.dtype
    seed: int
    checkpoint: Path | None
    loss: Callable[[Any, dict[str, Any], torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
    evaluate: Callable[[int], dict[str, Any]] | None
    metrics: MetricsCallback
    engine: Engine
    trainable: Sequence[torch.nn.Parameter] = ()
    embeddings: Sequence[torch.nn.Parameter] = ()
    guarded: Sequence[torch.nn.Parameter] = ()
    allocator: RankAllocator | None = None
    manifest: Mapping[str, Any] = field(default_factory=dict)
    deadline: float | None = None
    evaluations: Iterable[Sequence[float]] = ()
    tracker: TrackerRun | None = None
    notices: list[str] = field(default_factory=list)
    trainer: Callable[[PhaseRun, ShutdownRequest], PlannedTrainer] | None = None

    @property
    def allocates_ranks(self) -> bool:
        """Whether this phase trains the adapter with allocated ranks; other phases leave its ranks alone."""
        return "lora" in self.phase.parts

    def notify(self, text: str) -> None:
        """Print a notice and keep it for the report."""
        console.notice(text)
        self.notices.append(text)


def train_phase(job: PhaseRun) -> int:
    """Train the phase to its end, from the checkpoint if there is one; return the number of steps done.

    Raises NumbersError on NaN or a failed audit, Interrupted after saving on a stop signal or near the time limit.
    """
    if not torch.accelerator.is_available():
        keep_freed_memory()
    if job.checkpoint:
        job.engine.check_resumes(job.checkpoint)
    shutdown = ShutdownRequest(job.deadline)
    with on_stop_signals(shutdown.on_signal), job.tracker.environment() if job.tracker else nullcontext():
        # Put the Trainer together.
        trainer = (job.trainer or PlannedTrainer)(job, shutdown)
        trainer.remove_callback(PrinterCallback)
        for callback in (job.metrics, EvaluationCallback(job), AllocatorCallback(job), trainer.guard):
            trainer.add_callback(callback)
        if not job.engine.is_deepspeed:  # DeepSpeed hides its gradients
            trainer.add_callback(FirstStepsAudit())
        start, patience = step_of(job.checkpoint) if job.checkpoint else 0, job.phase.config.patience
        if job.tracker and trainer.is_world_process_zero():
            trainer.add_callback(TrackerCallback(job.tracker, start))
        job.metrics.begin(start, job.evaluations)

        # Train the remaining steps.
        if start >= len(job.phase.plan) or job.metrics.out_of_patience(patience):
            trainer._load_from_checkpoint(str(job.checkpoint))
            done = start
        else:
            done = _train(trainer, job, shutdown, start)

        # Take the best weights, and check that they are finite.
        if patience:
            _load_best(trainer, job, done)
        if (name := first_not_finite(job.model)) is not None:
            raise NumbersError(_("some weights are not finite after training"), place=name)
    return done


def _train(trainer: PlannedTrainer, job: PhaseRun, shutdown: ShutdownRequest, start: int) -> int:
    """Train from step `start`; return the number of steps done."""
    if trainer.args.should_save:
        check_space(job.phase.checkpoints, job.model)
    if shutdown.is_short:
        console.notice(
            _(
                "only one step is run and saved: the time left is too short for two saves (estimated at {save:.0f} s each until one is measured); each command advances one step"
            ).format(save=shutdown.save)
        )
    trainer.train(resume_from_checkpoint=str(job.checkpoint) if job.checkpoint else None)
    done: int = trainer.state.global_step
    if trainer.guard.should_stop(trainer.args.device):
        last = describe_last(job.phase.checkpoints)
        raise Interrupted(
            _("stopped ({why}); {last}; the same command continues").format(
                why=shutdown.reason or _("by another process"), last=last
            ),
            place=_("step {steps_before}").format(steps_before=job.phase.steps_before + done),
        )
    skipped = trainer.guard.skipped
    if 0 < done - start <= skipped:
        raise NumbersError(
            _("fp16 overflowed in every step; none updated the weights"),
            place="precision: fp16",
            remedy=_("precision: bf16 (or fp32 if the device has no bf16)"),
        )
    if skipped:
        console.notice(_("fp16 overflowed in {skipped} steps; they were skipped").format(skipped=skipped))
    return done


def _load_best(trainer: PlannedTrainer, job: PhaseRun, done: int) -> None:
    """Load the checkpoint of the best evaluation if it is not the last step. Raises ArtifactError when it is damaged."""
    if (best := job.metrics.best) and best[0] != done:
        checkpoint = job.phase.checkpoints / f"checkpoint-{best[0]}"
        console.notice(_("using the weights of step {best}, the best").format(best=best[0]))
        if problem := damage(checkpoint):
            raise ArtifactError(problem, place=str(checkpoint), remedy=_("--again starts over"))
        trainer._load_from_checkpoint(str(checkpoint))
    if job.metrics.no_improvement:
        job.notify(job.metrics.no_improvement)


def steps_of(amount: float, total: int) -> int:
    """Return a number of steps, given as a number or as a share (below 1) of the total."""
    return round(amount * total) if amount < 1 else int(amount)


def unreached_rate(section: Training, steps: int) -> str:
    """Return a message when warmup and decay leave no step at the peak learning rate, else an empty text."""
    warm, decay = steps_of(section.warmup, steps), steps_of(section.decay, steps) if section.schedule == "wsd" else 0
    if not steps or warm + decay <= steps:
        return ""
    if warm >= steps:
        return _(
            "warmup: {warmup:g} takes {warm} steps, but there are only {steps}: the learning rate never reaches its peak"
        ).format(warmup=section.warmup, warm=warm, steps=steps)
    return _(
        "warmup and decay take {warm} + {decay} steps, but there are only {steps}: the learning rate never reaches its peak"
    ).format(warm=warm, decay=decay, steps=steps)


def training_arguments(
    job: PhaseRun, kind: type[TrainingArguments] = TrainingArguments, **further: Any
) -> TrainingArguments:
    """Return the recipe's settings as TrainingArguments of a kind; those under `trainer:` are passed unchanged."""
    section, plan = job.phase.config, job.phase.plan
    total = len(plan)
    if "8bit" in section.optimizer and importlib.util.find_spec("bitsandbytes") is None:
        raise MissingPackage("bitsandbytes", f"optimizer: {section.optimizer}", "qlora")
    ours: dict[str, Any] = {
        "output_dir": str(job.phase.checkpoints),
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 1,  # a batch is a whole step: see training_step
        "max_steps": total,
        "learning_rate": job.phase.learning_rate,
        "optim": OPTIMIZERS.get(section.optimizer, "adamw_torch_fused"),
        "lr_scheduler_type": SCHEDULES[section.schedule],
        "warmup_steps": steps_of(section.warmup, total),
        "weight_decay": section.weight_decay,
        "max_grad_norm": section.max_grad_norm,
        "bf16": job.dtype == torch.bfloat16 and job.engine.is_deepspeed,  # other engines: see compute_loss
        "fp16": job.dtype == torch.float16,
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
        "use_cpu": not torch.accelerator.is_available(),  # without it each process of a CPU run under torchrun trains alone
        **(job.tracker.arguments if job.tracker else {"report_to": "none"}),
        **further,
    }
    if section.schedule == "wsd":
        ours["lr_scheduler_kwargs"] = {"num_decay_steps": max(1, steps_of(section.decay, total))}
    settings = (
        ours | job.engine.arguments | section.trainer
    )  # the recipe reader has refused keys that the recipe sets itself
    try:
        arguments = kind(**settings)
    except (ValueError, TypeError, LookupError, AttributeError, ImportError) as error:
        if not section.trainer:
            raise
        raise _rejected_settings(section.trainer, error) from error
    arguments._n_gpu = min(arguments.n_gpu, 1)  # one process, one GPU: DataParallel would split a pack (F-06)
    return arguments


class PlannedTrainer(Trainer):
    """transformers' Trainer over the batches of a plan.

    Overrides eight private methods of Trainer, as in transformers 5.17 to 5.18; tests/train/test_trainer.py fails when a
    name or a signature changes:

    _prepare_for_training            the engine verifies the model and optimizer that accelerate returns
    _get_num_items_in_batch          learned tokens of the whole step, over all ranks
    _track_num_input_tokens          counts the micro-batches of a step
    _get_grad_norm                   the last call before a step is taken: NaN stops the run here
    _load_from_checkpoint            FSDP2 shards, DeepSpeed's folder, AdaLoRA's ranks
    _load_optimizer_and_scheduler    a fork keeps its new learning rates
    _get_output_dir, _save_checkpoint  a checkpoint is staged, then committed by a rename
    """

    def __init__(self, job: PhaseRun, shutdown: ShutdownRequest) -> None:
        self.job, self.shutdown = job, shutdown
        self.batches = StepBatches(self.make_micro_batches(), job.phase.plan)
        self._staging: Path | None = None
        self.noise = Neftune(job.model, job.phase.config.neftune) if job.phase.config.neftune else None
        super().__init__(**self.arguments_of_base())
        self.train_dataset = self.batches
        self.model_accepts_loss_kwargs = True  # the loss below is already scaled over the accumulation
        self.guard = NanGuard(
            job.phase.plan,
            job.store.origin,
            self.accelerator.gather,
            shutdown.should_stop,
            lambda: describe_last(job.phase.checkpoints),
            job.metrics.before_steps,
            job.model.config.get_text_config().vocab_size,
        )

    def make_micro_batches(self) -> Any:
        """Return the micro-batches of the phase, in the order of its plan."""
        return MicroBatches(self.job.store, self.job.phase.plan.flat(), packed=self.job.packed)

    def arguments_of_base(self) -> dict[str, Any]:
        """Return the arguments of the class below."""
        job = self.job
        return {
            "model": job.model,
            "args": training_arguments(job),
            "train_dataset": self.batches,
            "processing_class": job.tokenizer,
            "optimizer_cls_and_kwargs": muon_of(job) if job.phase.config.optimizer == "muon" else None,
        }

    @property
    def _is_shared_adapter(self) -> bool:
        return self.job.engine.name == "fsdp2" and is_peft_model(self.job.model)

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        self.job.engine.enforce(self.accelerator)
        self.job.engine.reserve_accumulation(self.accelerator, self.job.phase.plan.accumulate)
        self.is_fsdp_enabled = self.accelerator.is_fsdp2

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> tuple[Any, DataLoader]:
        prepared: tuple[Any, DataLoader] = super()._prepare_for_training(*args, **kwargs)
        self.job.engine.verify(self.model_wrapped, self.model, self.optimizer)
        return prepared

    def get_train_dataloader(self) -> DataLoader:
        """Return the plan's steps in order, rank by rank; accelerate gives every rank its own."""
        loader = DataLoader(self.batches, batch_size=1, sampler=SequentialSampler(self.batches), collate_fn=_single)
        return self.accelerator.prepare(loader)

    def _get_num_items_in_batch(self, batch_samples: list[list[dict[str, Any]]], device: torch.device) -> torch.Tensor:
        """Return the learned tokens of the whole optimizer step, over its micro-batches and all ranks."""
        count = torch.tensor(sum(micro["learned"] for step in batch_samples for micro in step), device=device)
        return self.accelerator.gather(count).sum() if self.args.world_size > 1 else count

    def training_step(self, model: Any, inputs: list[dict[str, Any]], num_items_in_batch: Any = None) -> torch.Tensor:
        """Accumulate the gradient of this rank's micro-batches of a step; the ranks exchange it with the last of them."""
        losses = []
        self.current_gradient_accumulation_steps = len(inputs)
        for place, micro in enumerate(inputs, 1):
            is_last = place == len(inputs)
            self.accelerator.sync_gradients = is_last  # DeepSpeed ends a step by it, whatever its own count says
            waits = not is_last and not self.job.engine.is_deepspeed
            with self.accelerator.no_sync(model) if waits else nullcontext():
                losses.append(super().training_step(model, micro, num_items_in_batch))
        return torch.stack(losses).sum()

    def floating_point_ops(self, inputs: list[dict[str, Any]]) -> int:
        return sum(super(PlannedTrainer, self).floating_point_ops(micro) for micro in inputs)

    def _track_num_input_tokens(self, inputs: list[dict[str, Any]]) -> None:
        for micro in inputs:
            super()._track_num_input_tokens(micro)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        # accelerate's own autocast would make an fp32 copy of all logits, the largest tensor of many runs.
        half = self.job.dtype == torch.bfloat16 and not self.job.engine.is_deepspeed
        with (
            torch.autocast(self.args.device.type, torch.bfloat16, enabled=half),
            self.noise.scaled_for(inputs) if self.noise else nullcontext(),
        ):
            # DDP averages the ranks' gradients, so each rank's part of the mean is multiplied by their number.
            mean, nats = self.job.loss(model, inputs, self.args.world_size / num_items_in_batch)
        self.guard.note(nats.sum(), num_items_in_batch)
        if self.job.allocator and self.job.allocates_ranks:
            mean = mean + self.job.allocator.penalty() / self.current_gradient_accumulation_steps
        return mean

    def log(self, logs: dict[str, float], *rest: Any) -> None:
        """Log the held-out scores together with the loss of their step."""
        super().log({**logs, **{f"eval_{name}": score for name, score in self.job.metrics.scores.items()}}, *rest)

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """Check the step here, just before it is taken."""
        norm = super()._get_grad_norm(model, grad_norm)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        self.guard.check(self.state.global_step, norm, model, scaled=self.accelerator.mixed_precision == "fp16")
        return norm

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        passed = self.job.phase.config.trainer
        try:
            optimizer = super().create_optimizer(*args, **kwargs)
        except (ValueError, TypeError) as error:
            if not passed:
                raise
            raise _rejected_settings(passed, error) from error
        self._set_embeddings_apart(optimizer)
        inside = {id(part) for group in optimizer.param_groups for part in group["params"]}
        lost = [
            name for name, part in self.job.model.named_parameters() if part.requires_grad and id(part) not in inside
        ]
        if lost or not inside:
            raise NumbersError(
                _("{count} trainable tensors are not in the optimizer").format(count=len(lost)),
                place=lost[0] if lost else "optimizer",
            )
        self._group_parameters = [list(group["params"]) for group in optimizer.param_groups]
        return optimizer

    def _set_embeddings_apart(self, optimizer: torch.optim.Optimizer) -> None:
        """Move the embeddings to parameter groups with their own rate.

        Guarded ones get no weight decay, which would move rows that have no gradient.
        """
        apart, guarded = {id(part) for part in self.job.embeddings}, {id(part) for part in self.job.guarded}
        for group in list(optimizer.param_groups):
            for chosen in (guarded, apart - guarded):
                mine = [part for part in group["params"] if id(part) in chosen]
                if not mine:
                    continue
                group["params"] = [part for part in group["params"] if id(part) not in chosen]
                decay = 0.0 if chosen is guarded else group["weight_decay"]
                rate = self.job.phase.embedding_learning_rate
                optimizer.add_param_group({**group, "params": mine, "lr": rate, "weight_decay": decay})

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        if self.job.engine.name == "fsdp2":
            # accelerate finds the shards of an optimizer's parameters by their addresses, and empty shards share one.
            for group, parameters in zip(self.optimizer.param_groups, self._group_parameters, strict=True):
                group["params"] = parameters
        if self.job.phase.config.schedule == "warmup_lr":
            warm = max(2, self.args.get_warmup_steps(num_training_steps))
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
                optimizer or self.optimizer, lambda step: min(1.0, math.log(step + 1) / math.log(warm))
            )
            self._created_lr_scheduler = True
        return super().create_scheduler(num_training_steps, optimizer)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if self.job.allocator:
            self.job.allocator.load(Path(resume_from_checkpoint))
        elif self.deepspeed:
            deepspeed_load_checkpoint(self.deepspeed, resume_from_checkpoint, load_module_strict=False)
        elif self._is_shared_adapter:
            file = Path(resume_from_checkpoint) / FSDP_FILE
            scatter(self.job.model, torch.load(file, map_location="cpu", mmap=True, weights_only=True))
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Load the optimizer's state; take learning rate and other settings from the recipe, which a fork may have changed."""
        settings = [
            {key: value for key, value in group.items() if key != "params"} for group in self.optimizer.param_groups
        ]
        bases = list(self.lr_scheduler.base_lrs)
        if self.args.device.type == "cpu":
            _register_numbered_cpu()
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None or self.is_deepspeed_enabled:
            return
        scheduler = getattr(self.lr_scheduler, "scheduler", self.lr_scheduler)
        scheduler.base_lrs = bases
        scheduler._last_lr = [
            base * shape(scheduler.last_epoch) for base, shape in zip(bases, scheduler.lr_lambdas, strict=True)
        ]
        for group, own, rate in zip(self.optimizer.param_groups, settings, scheduler._last_lr, strict=True):
            group.update({**own, "lr": rate})

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._staging or self.args.output_dir)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Let all processes write into the staging folder, then commit it: a checkpoint is complete or absent."""
        folder, began = Path(self.args.output_dir), time.time()
        self._check_state()
        if self.args.should_save:
            check_space(folder, self.job.model)
            prepare_staging(folder)
        self.accelerator.wait_for_everyone()
        self._staging = folder / STAGING
        try:
            super()._save_checkpoint(model, trial)
        finally:
            staged, self._staging = self._staging / f"checkpoint-{self.state.global_step}", None
        if self._is_shared_adapter:
            # accelerate omits tied names, and tensors that only an earlier phase has trained.
            whole = gather(self.job.model, self.job.trainable)
            if self.args.should_save:
                torch.save(whole, staged / FSDP_FILE)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            check_adapter_saved(staged)
            if self.job.allocator:
                self.job.allocator.save(staged)
            config, best = self.job.phase.config, self.job.metrics.best
            if self.job.metrics.file.is_file():
                artifact.sync_file(self.job.metrics.file)
            manifest = {**self.job.manifest, "evaluations": self.job.metrics.evaluations}
            commit(staged, folder, manifest, config.keep_checkpoints, best[0] if best and config.patience else None)
        self.accelerator.wait_for_everyone()
        self.shutdown.on_save(time.time() - began)

    def _check_state(self) -> None:
        """Raise NumbersError on all processes when weights or optimizer state on one of them are not finite."""
        bad = first_not_finite(self.job.model, self.optimizer)
        found = torch.tensor([float(bad is not None)], device=self.args.device)
        if bool(self.accelerator.gather(found).any()):
            raise NumbersError(
                _("weights or optimizer state are not finite; nothing was saved"),
                place=_("step {global_step}").format(global_step=self.state.global_step) + f" · {bad or '?'}",
                remedy=describe_last(self.job.phase.checkpoints),
            )


def muon_of(job: PhaseRun) -> tuple[Any, dict[str, Any]]:
    """Return torch's Muon, which orthogonalises matrix updates. Raises RecipeError if anything else is trainable."""
    whole = {id(part) for part in job.embeddings}
    for name, part in job.model.named_parameters():
        if part.requires_grad and (part.dim() != 2 or id(part) in whole or "embed" in name or "lm_head" in name):
            raise RecipeError(
                _("muon only trains matrices of hidden layers; {name} {shape} is not one").format(
                    name=name, shape=tuple(part.shape)
                ),
                place="optimizer",
                remedy="optimizer: adamw",
            )
    return torch.optim.Muon, {"lr": job.phase.learning_rate, "weight_decay": job.phase.config.weight_decay}


class EvaluationCallback(TrainerCallback):
    """Score the held-out set every `evaluate_every` steps and at the end of a phase, with the random state preserved.

    With `patience`, save a checkpoint at the best score, and stop after that many evaluations without a better one.
    """

    def __init__(self, job: PhaseRun) -> None:
        self.job = job

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        config, metrics = self.job.phase.config, self.job.metrics
        every, step = config.evaluate_every, state.global_step
        ends_phase = step == len(self.job.phase.plan) and metrics.before_steps + step < len(metrics.tokens)
        if not (every and self.job.evaluate and (step % every == 0 or ends_phase)):
            return
        with torch.random.fork_rng():
            scores = self.job.evaluate(metrics.before_steps + state.global_step)
        metrics.on_scores(state.global_step, scores)
        control.should_log = True
        if config.patience and metrics.best:
            control.should_training_stop |= metrics.out_of_patience(config.patience)
            control.should_save |= control.should_training_stop or metrics.best[0] == state.global_step


class AllocatorCallback(TrainerCallback):
    """Update AdaLoRA's rank budget before the gradients are cleared."""

    def __init__(self, job: PhaseRun) -> None:
        self.job = job

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.job.allocator and self.job.allocates_ranks:
            self.job.allocator.update_ranks(state.global_step)


@cache
def _register_numbered_cpu() -> None:
    """Let torch load a CPU checkpoint to "cpu:0", as transformers 5.17 requests. Register once only."""
    torch.serialization.register_package(
        30, lambda storage: None, lambda storage, location: storage if location.startswith("cpu:") else None
    )


def _rejected_settings(arguments: Mapping[str, Any], error: Exception) -> RecipeError:
    return RecipeError(
        _("transformers does not accept {arguments}: {error}").format(arguments=arguments, error=first_line(error)),
        place="trainer",
        remedy=_("correct the value, or leave the setting out"),
    )


def _single(batch: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    return batch[0]
