"""The phases of a training job: their batches, the checkpoint to resume from, and the conditions of a run."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch

from tongwen.core import artifact, console, distributed, resume
from tongwen.core.errors import RecipeError
from tongwen.core.i18n import _
from tongwen.data.preference_store import Samples
from tongwen.model.loading.architecture import load_config
from tongwen.model.loading.locate import locate
from tongwen.recipe.phases import training_phases
from tongwen.train.checkpoints import newest_checkpoint, read_manifest, step_of
from tongwen.train.memory import own_memory, token_budget
from tongwen.train.metrics import flat_loss_in_phase
from tongwen.train.metrics_file import read_metrics
from tongwen.train.packing import make_plan
from tongwen.train.phase import Phase
from tongwen.train.trainer import unreached_rate
from tongwen.workflows.training.types import PreparedModel, TrainingJob


def plan_phases(job: TrainingJob, device: str, checkpoints: Path) -> list[Phase]:
    """Return the recipe's phases with their batches. A phase begins with an epoch that no earlier one has used."""
    section, phases = job.section, list[Phase]()
    config = load_config(locate(job.base))
    budget = token_budget(device, config, own_memory(device), full="full" in section.trained_parts)
    uniform = resume.has_uniform_steps(checkpoints.parent)
    steps, epochs = 0, 0
    for number, resolved in enumerate(training_phases(section), 1):
        settings = resolved.config
        plan = make_plan(
            job.data.store.lengths,
            lambda epoch, before=epochs: job.data.draw(before + epoch),  # type: ignore[misc]
            batch_size=settings.batch_size,
            batch_tokens=settings.batch_tokens,
            stop_after=settings.stop_after,
            budget=settings.micro_batch_tokens or budget,
            world=distributed.world_size(),
            uniform=uniform,
        )
        folder = checkpoints / f"phase-{number}" if len(section.trains) > 1 else checkpoints
        phases.append(Phase(*resolved, plan, folder, steps, epochs))
        steps, epochs = steps + len(plan), epochs + math.ceil(len(plan) / plan.steps_per_epoch)
    return phases


def report_plan(phases: list[Phase], store: Samples, counts: dict[str, Any]) -> None:
    """Print steps, tokens and trained parameters, and notices about settings that the plan never reaches."""
    plan = phases[0].plan
    slots = "–".join(str(count) for count in sorted({min(plan.slots), plan.accumulate}))
    steps = " + ".join(str(len(phase.plan)) for phase in phases)
    tokens = console.human_count(sum(sum(phase.plan.tokens_of(store.lengths)) for phase in phases))
    console.info(
        _(
            "{steps} steps, {tokens} tokens; each step has {accumulate} x {world} micro-batches of at most {budget} tokens"
        ).format(steps=steps, tokens=tokens, accumulate=slots, world=plan.world, budget=plan.budget)
    )
    for phase in phases:
        if notice := unreached_rate(phase.config, len(phase.plan)):
            console.notice(notice)
        every = phase.config.save_every
        if "save_every" in phase.config.model_fields_set and every >= len(phase.plan):
            console.notice(
                _("save_every: {every}, but there are only {count} steps: if interrupted, training starts over").format(
                    every=every, count=len(phase.plan)
                )
            )
    console.info(
        _("training {parameters:,} of {total:,} parameters ({share:.2%})").format(
            parameters=counts["parameters"], total=counts["of"], share=counts["share"]
        )
    )


@dataclass(frozen=True)
class ResumePoint:
    """The progress of a run.

    phases:     the remaining phases, the current one first; is_phased: whether the stage has several
    checkpoint: of the current phase; None at its beginning
    start:      number of the stage's steps that are done
    tokens:     cumulative tokens after each step of the whole stage
    budget:     tokens of a micro-batch when scoring
    manifest:   the run's entries in a checkpoint's manifest
    """

    phases: list[Phase]
    is_phased: bool
    checkpoint: Path | None
    start: int
    tokens: list[int]
    budget: int
    manifest: dict[str, Any]

    def checkpoint_of(self, phase: Phase) -> Path | None:
        return self.checkpoint if phase is self.phases[0] else None

    def evaluations_of(self, checkpoint: Path | None) -> list[Any]:
        return evaluations_of(checkpoint, self.manifest)

    def throughput(self, done: int, metrics: Path, seconds: float) -> dict[str, Any]:
        """Return steps, tokens and seconds of the run; the metrics file also covers the time before an interruption."""
        trained = self.tokens[done - 1] - (self.tokens[self.start - 1] if self.start else 0)
        counted = self.tokens[done - 1]
        if lines := read_metrics(metrics):
            counted, seconds = lines[-1]["tokens"], lines[-1]["seconds"]
        return {
            "steps": done,
            "tokens": self.tokens[done - 1],
            "tokens_this_run": trained,
            "seconds": round(seconds, 2),
            "tokens_per_second": round(counted / max(seconds, 1e-9), 2),
        }

    def flat_losses(self, phases: list[Phase], metrics: Path) -> list[str]:
        """Return the report's notices about phases whose loss has not fallen."""
        lines = read_metrics(metrics)
        return [flat for phase in phases if (flat := flat_loss_in_phase(lines, phase.steps_before, phase.last_step))]


def find_resume_point(job: TrainingJob, model: PreparedModel, phases: list[Phase], run: dict[str, Any]) -> ResumePoint:
    """Return where the run continues. Raises RecipeError if the recipe ends earlier or has other batches."""
    tokens = list(accumulate(size for phase in phases for size in phase.plan.tokens_of(job.data.store.lengths)))
    folders = [phase.checkpoints for phase in phases]
    checkpoint = newest_checkpoint(folders, resume.ids(run))
    current = folders.index(checkpoint.parent) if checkpoint else 0
    start = phases[current].steps_before + (step_of(checkpoint) if checkpoint else 0)
    conditions = _conditions(model, phases[current])
    if start > len(tokens):
        raise RecipeError(
            _("{start} steps are done, but the recipe now has only {count}").format(start=start, count=len(tokens)),
            place=f"{job.stage}.stop_after",
            remedy=resume.rerun_hint(),
        )
    if checkpoint:
        before = read_manifest(checkpoint)["conditions"]
        _check_packs(before, conditions, job)
        _report_conditions(before, conditions)
    if start:
        console.notice(_("continuing after step {start} of {count}").format(start=start, count=len(tokens)))
    manifest = {**run, "conditions": conditions}
    budget = phases[0].plan.budget
    return ResumePoint(phases[current:], len(phases) > 1, checkpoint, start, tokens, budget, manifest)


def evaluations_of(checkpoint: Path | None, run: dict[str, Any]) -> list[Any]:
    """Return the evaluations recorded in a checkpoint; none if other data was held out then (--fork), or if an earlier
    version saved it."""
    before = read_manifest(checkpoint) if checkpoint else {"identity": {}}
    same = before["identity"].get(resume.DATA) == run["identity"][resume.DATA]
    return list(before.get("evaluations", ())) if same else []


def _conditions(model: PreparedModel, phase: Phase) -> dict[str, Any]:
    """Return conditions that change a result only by the order of sums or by a version's arithmetic."""
    return {
        "processes": phase.plan.world,
        "device": model.device,
        "packed": model.packed,
        "threads": torch.get_num_threads(),
        "micro_batch_tokens": phase.plan.budget,
        "activation_checkpointing": phase.config.activation_checkpointing,
        "compile": phase.config.compile,
        "versions": artifact.versions(),
    }


def _check_packs(before: dict[str, Any], now: dict[str, Any], job: TrainingJob) -> None:
    """Raise RecipeError if the packs have changed: with `batch_tokens`, they decide which samples a step has."""
    names = ("processes", "micro_batch_tokens")
    if job.section.batch_tokens and any(before[name] != now[name] for name in names):
        changed = "; ".join(f"{name}: {before[name]} → {now[name]}" for name in names)
        raise RecipeError(
            _("with batch_tokens, the samples of a step depend on both settings, which have changed: {changed}").format(
                changed=changed
            ),
            place=f"{job.stage}.batch_tokens",
            remedy=f"--devices {before['processes']} {job.stage}.micro_batch_tokens={before['micro_batch_tokens']}",
        )


def _report_conditions(before: dict[str, Any], now: dict[str, Any]) -> None:
    """Say what has changed. A condition that an older version did not record is not known to have."""
    now = {name: value for name, value in now.items() if name in before}
    changed = ", ".join(f"{name}: {old} → {new}" for name, old, new in artifact.differences(before, now))
    if changed:
        console.notice(
            _("{changed}: the same samples in the same order, but the numbers are no longer bit-identical").format(
                changed=changed
            )
        )
