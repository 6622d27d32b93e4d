"""The training job of `pretrain` and `sft`, in one function: from the encoded data to the finished folder."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from tongwen.core import artifact, console, distributed, resume
from tongwen.core.errors import MachineError, RecipeError, first_line, is_out_of_memory
from tongwen.core.i18n import _
from tongwen.data.token_bytes import token_bytes
from tongwen.model.adapters.adalora import rank_allocator
from tongwen.model.adapters.settings import check_continued
from tongwen.model.kernels.loss import learned_loss
from tongwen.model.loading import devices
from tongwen.model.loading.fingerprint import fingerprint_tokenizer
from tongwen.recipe.memory_remedies import cheaper, last_resort
from tongwen.train import trackers
from tongwen.train.metrics import MetricsCallback, check_forgetting
from tongwen.train.parallel import broadcast_from_rank0, choose_engine, gather
from tongwen.train.phase import Phase
from tongwen.train.report import report_result
from tongwen.train.trainer import PhaseRun, train_phase
from tongwen.workflows.tokenized_data import report_ledger
from tongwen.workflows.training import keep
from tongwen.workflows.training.model import (
    answer_prompts,
    audit_phase,
    prepare_model,
    save_model,
    score_held_out,
    set_memory_savers,
)
from tongwen.workflows.training.own_answers import OwnAnswers, make_own_answers
from tongwen.workflows.training.phases import ResumePoint, find_resume_point, plan_phases, report_plan
from tongwen.workflows.training.report import SAMPLES, facts_of, make_report, method_of, save_answers, write_results
from tongwen.workflows.training.types import PreparedModel, TrainingJob


def train_stage(job: TrainingJob, out: Path) -> artifact.Artifact:
    """Train a stage's model phase by phase, and write the finished folder `out`.

    Raises:
        RecipeError, ModelError: The model cannot be trained this way.
        NumbersError: An audit failed, or a number is not finite.
        Interrupted: The run was asked to stop, and has saved a checkpoint.
        MachineError: Out of memory; the error lists remedies.
    """
    # Check the inputs, and plan the batches of each phase.
    _check_evaluations(job)
    engine = choose_engine(job.section)
    if distributed.is_main_process():  # only this process reports to trackers
        trackers.check(job.recipe.track)
    check_continued(job.section.adapter, job.stage)
    report_ledger(job.data)
    device = devices.compute_device()
    phases = plan_phases(job, device, artifact.partial_of(out) / "checkpoints")
    with _explain_out_of_memory(job, phases, device) as opened:
        # Prepare the model: open the base, attach the adapter, place both on the device.
        model = prepare_model(job, phases, device, engine)
        opened.append(model)
        trained = model.adapted.counts
        report_plan(phases, job.data.store, trained)
        parents = _parents(job, model)
        with artifact.create(out, job.stage, parents, job.settings, resumable=True) as draft:
            # Enter the run: a new one, or an interrupted one with the same settings, data and base.
            run = resume.enter(draft.path, job.settings, _identity(job, model, parents))
            progress = find_resume_point(job, model, phases, run)

            # Audit the first phase before anything slow. Then score the held-out data, once.
            guarded, unreached = _begin_phase(model, progress.phases[0], job, len(phases) > 1)
            own = make_own_answers(job, model, progress.budget) if job.measures_divergence else None
            way_back = keep.before_training(job, model) if job.section.keep else None
            before = _load_or_make(
                draft.path / resume.BEFORE, lambda: _score_and_answer(job, model, progress.budget, own, None)
            )

            # Train each remaining phase, from the newest checkpoint if there is one.
            notices, done, began = list[str](), progress.start, time.monotonic()
            best_score = before["scores"]["bits_per_byte"] if before["scores"] else math.inf
            with console.progress(len(progress.tokens), job.stage, progress.start) as bar:
                for phase in progress.phases:
                    if phase is not progress.phases[0]:
                        guarded, more = _begin_phase(model, phase, job, True)
                        unreached += more
                    metrics = MetricsCallback(draft.path / "metrics.jsonl", progress.tokens, phase, bar, best_score)
                    phase_run = _phase_run(job, model, phase, guarded, progress, metrics, before, own)
                    done = phase.steps_before + train_phase(phase_run)
                    notices += phase_run.notices
                    best_score = min((score for _, score in metrics.evaluations), default=math.inf)
            notices += _finish_adalora(model)
            throughput = progress.throughput(done, draft.path / "metrics.jsonl", time.monotonic() - began)

            # Go back towards the base as far as the recipe says. Score again, save, report.
            kept = keep.give_back(job.section.keep, model, own, way_back) if own and way_back else None
            after = _score_and_answer(job, model, progress.budget, own, before)
            _check_forgotten(job, before, after)
            whole = gather(model.model, model.adapted.trainable)
            if distributed.is_main_process():
                draft.fingerprint = save_model(job, model, draft.path, whole)
                draft.facts = facts_of(job, model, phases, throughput) | {"run": run["run"], "forks": run["forks"]}
                flat = progress.flat_losses(phases, draft.path / "metrics.jsonl")
                report = make_report(job, before, after, draft.path / SAMPLES) | {
                    "summary": f"{job.base} · {method_of(job.section)} · {_('{steps} steps').format(steps=throughput['steps'])}",
                    "trainable": trained,
                    "throughput": throughput,
                    "unreached": unreached,
                    "notices": job.data.notices + flat + notices,
                    **({"keep": kept} if kept else {}),
                    **(job.describe(before["scores"], after["scores"]) if after["scores"] else {}),
                }
                write_results(job, draft.path, report)
                draft.record_files(lambda file: file.suffix != ".safetensors" and file.parent == draft.path)
                report_result(report, out)
    return draft.artifact or artifact.Artifact(out, {"kind": job.stage, "fingerprint": ""})


def _check_evaluations(job: TrainingJob) -> None:
    if job.section.evaluate_every and not job.data.held_out_stores:
        raise RecipeError(
            _("there is no held-out data to evaluate during training"),
            place=f"{job.stage}.evaluate_every: {job.section.evaluate_every}",
            remedy="prepare: {held_out: 0.02}",
        )


def _parents(job: TrainingJob, model: PreparedModel) -> dict[str, Any]:
    """Return the result's parents by role. The stage that made the base is one: `run` detects if it was redone."""
    made = artifact.find(Path(job.base))
    return {
        "prepare": job.prepared.as_parent(),
        "base": {"path": job.base, "fingerprint": model.base_fingerprint},
        **({made.kind: made.as_parent()} if made else {}),
        "tokenizer": {"fingerprint": fingerprint_tokenizer(job.record_encoder.tokenizer)},
        **job.parents,
    }


def _identity(job: TrainingJob, model: PreparedModel, parents: dict[str, Any]) -> dict[str, str]:
    """Return what must be unchanged for an interrupted run to continue, besides its settings."""
    return {
        resume.DATA: job.prepared.fingerprint,
        "base (fingerprint)": model.base_fingerprint or job.base,
        "tokenizer (fingerprint)": parents["tokenizer"]["fingerprint"],
        resume.DTYPE: str(model.dtype).removeprefix("torch."),
    }


def _begin_phase(
    model: PreparedModel, phase: Phase, job: TrainingJob, is_named: bool
) -> tuple[list[torch.nn.Parameter], list[str]]:
    """Make exactly the phase's parts trainable, turn on its memory savers, and audit its gradients.

    Returns (embeddings of which only some rows are trained, trainable tensors that got no gradient in the audit).
    """
    guarded = model.adapted.train_only(phase.parts)
    if is_named:
        console.info(f"{phase.train}: {_('{steps} steps').format(steps=len(phase.plan))}")
    set_memory_savers(model, phase, job.data.store)
    return guarded, audit_phase(model, phase, job.data.store)


def _score_and_answer(
    job: TrainingJob, model: PreparedModel, budget: int, own: OwnAnswers | None, before: dict[str, Any] | None
) -> dict[str, Any]:
    """Return the scores of the held-out data, and the answers to the sample prompts. before: the same before training."""
    with torch.random.fork_rng():
        scores = None
        if job.data.held_out_stores:
            with console.waiting(_("scoring the held-out data")):
                scores = _score(job, model, budget, own, before)
        with console.waiting(_("answering the sample prompts")):
            answers = answer_prompts(model, job.record_encoder, [prompt.prompt for prompt in job.prompts])
    return {"scores": scores, "answers": answers}


def _score(
    job: TrainingJob, model: PreparedModel, budget: int, own: OwnAnswers | None, before: dict[str, Any] | None
) -> dict[str, Any]:
    """Return the scores of the held-out data, and how far the model has moved from the base's own answers."""
    sizes = torch.from_numpy(token_bytes(job.record_encoder.tokenizer))
    scores = score_held_out(model, job.data.held_out_stores, budget, sizes)
    scores |= job.measure(model, budget, before["scores"] if before else None)
    return scores | own.divergence(model) if own else scores


def _phase_run(
    job: TrainingJob,
    model: PreparedModel,
    phase: Phase,
    guarded: list[torch.nn.Parameter],
    progress: ResumePoint,
    metrics: MetricsCallback,
    before: dict[str, Any],
    own: OwnAnswers | None,
) -> PhaseRun:
    folder = metrics.file.parent

    def evaluate(step: int) -> dict[str, Any]:
        scores: dict[str, Any] = broadcast_from_rank0(_score(job, model, progress.budget, own, before))
        answers = answer_prompts(model, job.record_encoder, [prompt.prompt for prompt in job.prompts])
        save_answers(folder / SAMPLES, step, [prompt.title for prompt in job.prompts], answers)
        check_forgetting(before["scores"]["groups"], scores, job.forgetting)
        return scores

    checkpoint = progress.checkpoint_of(phase)
    has_own_rate = phase.embedding_learning_rate != phase.learning_rate
    return PhaseRun(
        phase=phase,
        model=model.model,
        tokenizer=job.record_encoder.tokenizer,
        store=job.data.store,
        packed=model.packed,
        dtype=model.dtype,
        seed=job.recipe.seed,
        checkpoint=checkpoint,
        loss=learned_loss,
        evaluate=evaluate if job.data.held_out_stores else None,
        metrics=metrics,
        engine=model.engine,
        trainable=model.adapted.trainable,
        embeddings=model.adapted.embeddings if has_own_rate else (),
        guarded=guarded,
        allocator=rank_allocator(model.model),
        manifest=progress.manifest,
        deadline=distributed.deadline(job.recipe.stop_before),
        evaluations=progress.evaluations_of(checkpoint),
        tracker=_tracker_run(job, phase, folder, progress, must=not checkpoint),
        trainer=job.trainer,
    )


def _tracker_run(
    job: TrainingJob, phase: Phase, folder: Path, progress: ResumePoint, *, must: bool
) -> trackers.TrackerRun | None:
    """Return the phase's run for the trackers; each phase is a separate run with steps counted from its start.

    must: a tracker that fails is an error, because nothing has been trained yet.
    """
    if not job.recipe.track:
        return None
    name = phase.checkpoints.name if progress.is_phased else ""
    title = "-".join(part for part in (job.recipe.name, job.stage, name) if part)
    return trackers.TrackerRun(
        job.recipe.track, title, progress.manifest["run"], folder, name, required=must and not phase.steps_before
    )


def _finish_adalora(model: PreparedModel) -> list[str]:
    """Make the cuts that AdaLoRA's schedule had left when training ended early, and return a notice about them."""
    allocator = rank_allocator(model.model)
    if not allocator or not (cut := allocator.reach_target_rank()):
        return []
    notice = _(
        "training ended before adalora had allocated its budget: cutting the {cut} least important ranks now"
    ).format(cut=cut)
    console.notice(notice)
    return [notice]


def _check_forgotten(job: TrainingJob, before: dict[str, Any], after: dict[str, Any]) -> None:
    """Report what the finished model has forgotten; unlike during training, nothing is stopped."""
    if after["scores"]:
        check_forgetting(before["scores"]["groups"], after["scores"], job.forgetting.as_warnings)


@contextmanager
def _explain_out_of_memory(job: TrainingJob, phases: list[Phase], device: str) -> Iterator[list[PreparedModel]]:
    """Turn an out-of-memory error into MachineError that lists changes to the recipe. The caller appends the opened
    model to the yielded list."""
    opened = list[PreparedModel]()
    try:
        yield opened
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise _out_of_memory(error, job, phases, device, opened) from error


def _out_of_memory(
    error: Exception, job: TrainingJob, phases: list[Phase], device: str, opened: list[PreparedModel]
) -> MachineError:
    recipe, lengths = job.recipe, job.data.store.lengths
    modules = [module for model in opened for module in model.model.modules()]
    if any(getattr(module, "gradient_checkpointing", False) for module in modules):
        section = job.section.model_copy(update={"activation_checkpointing": "on"})
        recipe = recipe.model_copy(update={job.stage: section})
    micro_tokens = max(int(lengths[list(micro)].sum()) for phase in phases for micro in phase.plan.flat())
    native = devices.compute_dtype("auto", device)[0] != torch.float32
    half = "auto" if native else "fp16" if device == "cuda" else ""
    firsts = dict[str, str]()
    for change in cheaper(recipe, job.stage, int(lengths.max()), micro_tokens, half):
        firsts.setdefault(change.split("=")[0], change)
    return MachineError(
        _("out of memory: {error}").format(error=first_line(error)[:160]),
        place=job.stage,
        remedy=_("try in this order, each in addition to the ones before: {changes}; then {last}").format(
            changes=" ".join(firsts.values()), last=last_resort(job.section)
        ),
    )


def _load_or_make(file: Path, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return the value in the file if an interrupted run wrote it; otherwise the first process makes and writes it."""
    if kept := _read_scores(file):
        return kept
    if file.is_file():
        console.notice(_("{file} cannot be read and is created again").format(file=file.name))
    value: dict[str, Any] = make()
    if distributed.is_main_process():
        artifact.write_json(file, value)
        return value
    while (kept := _read_scores(file)) is None:
        time.sleep(0.1)
    return kept


def _read_scores(file: Path) -> dict[str, Any] | None:
    try:
        kept = json.loads(file.read_text(encoding="utf-8"))
        return {name: kept[name] for name in ("scores", "answers")}
    except (OSError, ValueError, TypeError, KeyError):
        return None
