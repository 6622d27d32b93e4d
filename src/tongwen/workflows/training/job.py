"""The course of a training stage: what every one of them does between its data and its folder.

The base is opened and adapted. For each phase the audit proves on one micro-batch that each trainable tensor will learn
and that packed documents do not see each other; then transformers' Trainer runs the plan, from the newest checkpoint when
there is one. What comes out is scored in bits per byte on what was held out, before and after, and saved with tokenizer,
template and stop tokens. What a stage alone knows stands in its `TrainingJob`.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import set_seed

from tongwen.core import artifact, console, distributed
from tongwen.core import resume as gate
from tongwen.core.chat_template import Template
from tongwen.core.errors import MachineError, NumbersError, RecipeError, first_line, is_out_of_memory
from tongwen.core.i18n import say
from tongwen.core.model_families import family_of
from tongwen.data.encode import token_bytes
from tongwen.data.token_store import TokenStore
from tongwen.infer.generation import Sampling, TextGenerator
from tongwen.model.adapters import attach
from tongwen.model.adapters.adalora import budget_of
from tongwen.model.adapters.chain import make_room, open_adapter_chain
from tongwen.model.kernels import checkpointing, packed_attention
from tongwen.model.kernels.fused_blocks import fuse_blocks
from tongwen.model.kernels.loss import bits_per_byte, learned_loss, spare_head
from tongwen.model.loading import chat_setup, load
from tongwen.model.loading.fingerprint import fingerprint_model, fingerprint_tokenizer
from tongwen.model.loading.special_tokens import mend_ends
from tongwen.recipe.effects import deciding_settings, free_settings
from tongwen.recipe.load import dump
from tongwen.recipe.memory_remedies import cheaper, last_resort
from tongwen.recipe.phases import TrainingPhase, training_phases
from tongwen.recipe.schema import Recipe
from tongwen.recipe.training import Forgetting, Pretrain, Training
from tongwen.train import audit, trackers
from tongwen.train.checkpoints import check_adapter_saved, newest_checkpoint, read_manifest, step_of
from tongwen.train.memory import STATE_BYTES, device_memory, is_reckoned_to_fit, own_memory, token_budget
from tongwen.train.metrics import MetricsCallback, check_forgetting, flat_at, peak_memory_bytes, read_metrics
from tongwen.train.packing import BatchPlan, MicroBatches, fill, make_plan
from tongwen.train.parallel import Engine, agreed, choose, gather, in_fp32, reshard, sharing_of
from tongwen.train.report import held_out_table, say_result, write_report
from tongwen.train.trainer import TrainerJob, fit, unreached_rate
from tongwen.train.try_batch import fits
from tongwen.workflows.pipeline import standing_on
from tongwen.workflows.tokenized_data import RecordEncoder, TokenizedData, say_ledger

SAMPLES = "samples.jsonl"
SPARE = 0.03  # of a GPU's memory is left over when a micro-batch is tried: what the allocator breaks up in a long run


class SamplePrompt(NamedTuple):
    """What the model is asked before and after: a title, the prompt as text, and what the data says."""

    title: str
    prompt: str
    wanted: str


@dataclass(frozen=True)
class TrainingJob:
    """What one training stage knows of itself.

    rows:      finds, on the opened base, ids whose rows are trained beside the adapter
    new_rows:  ids that the part of that name trains
    template:  goes into the result, with its stop token
    end:       the id that ends a text, for a base that knows none that ends an answer
    parents:   what else the result was made from, by role
    facts:     what else the manifest tells
    questions: answered before and after, for the report
    """

    recipe: Recipe
    stage: str
    prepared: artifact.Artifact
    reader: RecordEncoder
    lesson: TokenizedData
    questions: list[SamplePrompt]
    rows: Callable[[Any], list[int]] = lambda model: []
    new_rows: Sequence[int] = ()
    template: Template | None = None
    end: int | None = None
    parents: dict[str, Any] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def section(self) -> Training:
        section: Training = getattr(self.recipe, self.stage)
        return section

    @property
    def base(self) -> str:
        return standing_on(self.recipe, self.stage)

    @property
    def settings(self) -> dict[str, Any]:
        return settings_of(self.recipe, self.stage)


def settings_of(recipe: Recipe, stage: str) -> dict[str, Any]:
    """What decides a training stage's result."""
    section: Training = getattr(recipe, stage)
    return {stage: deciding_settings(section), "seed": recipe.seed, "base": standing_on(recipe, stage)}


@dataclass(frozen=True)
class PreparedModel:
    """The adapted model with everything that it needs to read and to speak."""

    adapted: attach.Adapted
    stops: tuple[int, ...]
    packed: bool
    base_fingerprint: str | None
    device: str
    dtype: torch.dtype
    engine: Engine

    @property
    def model(self) -> Any:
        return self.adapted.model

    @contextmanager
    def computing(self) -> Iterator[None]:
        """The number type that the Trainer computes in, for what is computed outside of it."""
        with torch.autocast(self.device, self.dtype, enabled=self.dtype != torch.float32):
            yield
        reshard(self.model)


@dataclass(frozen=True)
class Phase:
    """A phase as it will be run: the words for it, its plan, where its checkpoints are, and what goes before it."""

    stretch: TrainingPhase
    plan: BatchPlan
    checkpoints: Path
    steps_before: int
    epochs_before: float


def train_stage(course: TrainingJob, out: Path) -> artifact.Artifact:
    """Adapt, score, audit and train phase by phase, score again, save. Raises MachineError with what helps when the memory does
    not suffice."""
    lesson, stage = course.lesson, course.stage
    if course.section.evaluate_every and not lesson.held_out_stores:
        raise RecipeError(
            say("nothing is held out that could be evaluated on the way", "没有留出数据，途中无从评测"),
            place=f"{stage}.evaluate_every: {course.section.evaluate_every}",
            remedy="prepare: {held_out: 0.02}",
        )
    engine = choose(course.section)
    if distributed.is_first():  # it alone tells them
        trackers.check(course.recipe.track)
    attach.check_further(course.section.adapter, stage)
    say_ledger(lesson)
    device = load.compute_device()
    legs = _lay_out(course, device, artifact.partial_of(out) / "checkpoints")
    pupil = None
    try:
        pupil = _prepare_model(
            course, device, engine, sum(len(leg.plan) for leg in legs if "lora" in leg.stretch.parts)
        )
        return _teach(course, pupil, legs, out)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise _out_of_memory(error, course, legs, device, pupil) from error


def _out_of_memory(
    error: Exception, course: TrainingJob, legs: list[Phase], device: str, pupil: PreparedModel | None
) -> MachineError:
    """With the changes of this recipe that need less, in their order."""
    recipe, lengths = course.recipe, course.lesson.store.lengths
    if pupil and any(getattr(module, "gradient_checkpointing", False) for module in pupil.model.modules()):
        section = course.section.model_copy(update={"activation_checkpointing": "on"})
        recipe = recipe.model_copy(update={course.stage: section})
    together = max(int(lengths[list(micro)].sum()) for leg in legs for micro in leg.plan.flat())
    native = load.compute_dtype("auto", device)[0] != torch.float32
    half = "auto" if native else "fp16" if device == "cuda" else ""
    firsts = dict[str, str]()
    for change in cheaper(recipe, course.stage, int(lengths.max()), together, half):
        firsts.setdefault(change.split("=")[0], change)
    return MachineError(
        say(f"out of memory: {first_line(error)[:160]}", f"内存不足：{first_line(error)[:160]}"),
        place=course.stage,
        remedy=say("in this order, each on top of those before: ", "依次尝试，逐项叠加：")
        + " ".join(firsts.values())
        + say("; then ", "；再不行，换")
        + last_resort(course.section),
    )


def _teach(course: TrainingJob, pupil: PreparedModel, legs: list[Phase], out: Path) -> artifact.Artifact:
    """What `train_stage` does with the opened base."""
    lesson, stage, trained = course.lesson, course.stage, pupil.adapted.counts
    _say_plan(legs, lesson.store, trained)
    sizes = torch.from_numpy(token_bytes(course.reader.tokenizer))
    limits = course.section.forgetting if isinstance(course.section, Pretrain) else Forgetting()

    def score() -> dict[str, Any]:
        return _score(pupil, lesson.held_out_stores, legs[0].plan.budget, sizes)

    def examine() -> dict[str, Any]:
        with torch.random.fork_rng(), console.waiting(say("scoring what was held out", "评测留出集")):
            scores = score() if lesson.held_out_stores else None
            return {"scores": scores, "answers": _answer(pupil, course)}

    parents = {
        "prepare": course.prepared.as_parent(),
        "base": {"path": course.base, "fingerprint": pupil.base_fingerprint},
        **_stage_below(course.base),
        "tokenizer": {"fingerprint": fingerprint_tokenizer(course.reader.tokenizer)},
        **course.parents,
    }
    with artifact.create(out, stage, parents, course.settings, resumable=True) as draft:
        identity = {
            gate.DATA: course.prepared.fingerprint,
            "base (fingerprint)": pupil.base_fingerprint or course.base,
            "tokenizer (fingerprint)": parents["tokenizer"]["fingerprint"],
            gate.DTYPE: str(pupil.dtype).removeprefix("torch."),
        }
        run = gate.enter(draft.path, course.settings, identity)
        before = _once(draft.path / gate.BEFORE, examine)

        def evaluate(step: int) -> dict[str, Any]:
            scores: dict[str, Any] = agreed(score())
            _tell_answers(draft.path / SAMPLES, step, course.questions, _answer(pupil, course))
            check_forgetting(before["scores"]["groups"], scores["groups"], limits)
            return scores

        throughput, unreached, notices = _train(
            course,
            pupil,
            legs,
            draft.path,
            evaluate if lesson.held_out_stores else None,
            run,
            before["scores"]["bits_per_byte"] if before["scores"] else math.inf,
        )
        after = examine()
        if after["scores"]:  # too late to stop
            least = min((limit for limit in (limits.warn, limits.stop) if limit is not None), default=None)
            check_forgetting(before["scores"]["groups"], after["scores"]["groups"], Forgetting(warn=least))
        whole = gather(pupil.model, pupil.adapted.learners)
        if distributed.is_first():
            draft.fingerprint = _save(course, pupil, draft.path, whole)
            draft.facts = _facts(course, pupil, legs, throughput) | {"run": run["run"], "forks": run["forks"]}
            report = {
                "summary": f"{course.base} · {_method(course)} · {throughput['steps']} {say('steps', '步')}",
                "ledger": _books(course),
                "mask": lesson.mask,
                "trainable": trained,
                "held_out": held_out_table(
                    before["scores"],
                    after["scores"],
                    {name: len(store) for name, store in lesson.held_out_stores.items()},
                ),
                "throughput": throughput,
                "peak_memory_bytes": peak_memory_bytes(),
                "unreached": unreached,
                "notices": lesson.notices + notices,
                "samples": _samples(
                    course.questions, before["answers"], after["answers"], read_metrics(draft.path / SAMPLES)
                ),
            }
            _write(course, draft.path, report)
            say_result(report, out)
    return draft.artifact or artifact.Artifact(out, {"kind": stage, "fingerprint": ""})


def _prepare_model(course: TrainingJob, device: str, engine: Engine, adapter_steps: int) -> PreparedModel:
    """The base, checked against its tokenizer, with what the recipe adds to it."""
    section, reader, place = course.section, course.reader, load.locate(course.base)
    dtype, why = load.compute_dtype(section.precision, device)
    trained = section.trained_parts
    with console.waiting(say("opening the base", "打开底座")):
        quantize = section.adapter.quantize if section.adapter.method == "qlora" else ""
        kept = attach.kept_in(trained, dtype)
        if engine.name == "fsdp2" and attach.base_learns(trained):  # it becomes fp32 when it is shared out
            kept = load.load_config(place).dtype or kept
        model, packed, fingerprint = _open(place, kept, quantize)
    if section.adapter.continue_from:
        make_room(model, load.find_adapter(Path(section.adapter.continue_from)))
    load.check_tokenizer(reader.tokenizer, model, place)
    mend_ends(reader.tokenizer, model, course.base)
    _check_lengths(model.config, course)
    audit.check_finite_base(model)
    stops = chat_setup.stop_ids(reader.tokenizer, course.template, getattr(model, "generation_config", None))
    stops = stops or ((course.end,) if course.end is not None else ())
    set_seed(course.recipe.seed)
    adapted = attach.adapt(
        model,
        section.adapter,
        course.rows(model),
        trained=trained,
        new_rows=list(course.new_rows),
        steps=adapter_steps,
        fingerprint=fingerprint,
    )
    for note in adapted.notices:
        console.notice(note)
    console.tell(f"{device} · {str(dtype)[6:]}: {why}")
    if engine.name == "fsdp2":
        engine.shard(adapted.model, dtype)
        adapted.find_learners()
    else:
        in_fp32(adapted.learners)
        if not quantize:  # quantised weights are where they belong
            adapted.model.to(device)
    if engine.is_whole and not (section.compile and device == "cuda"):  # whose compiler fuses more
        fuse_blocks(adapted.model)
    if section.compile:
        checkpointing.compile_layers(adapted.model)
    return PreparedModel(adapted, stops, packed, fingerprint, device, dtype, engine)


def _lay_out(course: TrainingJob, device: str, checkpoints: Path) -> list[Phase]:
    """The plan of each phase. A phase begins with an epoch that no phase before it has touched."""
    section, lesson, legs = course.section, course.lesson, list[Phase]()
    config = load.load_config(load.locate(course.base))
    budget = token_budget(device, config, own_memory(device), full="full" in section.trained_parts)
    steps, epochs = 0, 0
    for number, stretch in enumerate(training_phases(section), 1):
        words = stretch.config
        plan = make_plan(
            lesson.store.lengths,
            lambda epoch, before=epochs: lesson.draw(before + epoch),  # type: ignore[misc]
            batch_size=words.batch_size,
            batch_tokens=words.batch_tokens,
            stop_after=words.stop_after,
            budget=words.micro_batch_tokens or budget,
            world=distributed.world_size(),
        )
        folder = checkpoints / f"phase-{number}" if len(section.trains) > 1 else checkpoints
        legs.append(Phase(stretch, plan, folder, steps, epochs))
        steps, epochs = steps + len(plan), epochs + math.ceil(len(plan) / plan.steps_per_epoch)
    return legs


def _first(pupil: PreparedModel, store: TokenStore, plan: BatchPlan) -> dict[str, Any]:
    return MicroBatches(store, [plan.micro[0][0]], packed=pupil.packed)[0]


def make_ready(pupil: PreparedModel, leg: Phase, store: TokenStore) -> None:
    """What a phase does without: the head's logits, and activations where they do not fit. Before the audit, which goes
    through the model as a step does."""
    if pupil.engine.is_whole and pupil.dtype != torch.float16:  # whose small gradients wait for the scaler
        with pupil.computing():  # left at once: what autocast has cast without gradients, it would hand out again
            spare_head(pupil.model, audit.to_device(_first(pupil, store, leg.plan), pupil.model))
    _set_checkpointing(pupil, leg, store)


def _audit(pupil: PreparedModel, store: TokenStore, plan: BatchPlan) -> list[str]:
    """Nothing is trained before this has passed. Returns the trainable tensors that the first tokens did not reach."""
    first = _first(pupil, store, plan)
    with pupil.computing():
        unreached = audit.probe_gradients(pupil.model, first, learned_loss)
    console.good(say("audit: gradients reach every trained tensor", "审计通过：梯度到达所有训练参数"))
    if pupil.packed and len(store) > 1:
        with pupil.computing():
            audit.check_isolation(pupil.model, [store.sample(0), store.sample(1)], learned_loss)
        console.good(say("audit: documents in a pack do not see each other", "审计通过：打包的文档互不可见"))
    for name in unreached:
        console.notice(say(f"no token reached {name} in the first micro-batch", f"首个微批没有 token 到达 {name}"))
    return unreached


def _train(
    course: TrainingJob,
    pupil: PreparedModel,
    legs: list[Phase],
    folder: Path,
    evaluate: Callable[[int], dict[str, Any]] | None,
    run: dict[str, Any],
    untrained: float,
) -> tuple[dict[str, Any], list[str], list[str]]:
    """Run the phases, from the newest checkpoint if there is one; returns tokens and seconds, what the audits did not reach,
    and what the report says of the run. untrained: bits per byte of what was held out, before."""
    tokens = list(accumulate(size for leg in legs for size in leg.plan.tokens_of(course.lesson.store.lengths)))
    folders = [leg.checkpoints for leg in legs]
    resume = newest_checkpoint(folders, gate.ids(run))
    current = folders.index(resume.parent) if resume else 0
    start = legs[current].steps_before + (step_of(resume) if resume else 0)
    told = {**run, "conditions": _conditions(pupil, legs[current])}
    if start > len(tokens):
        raise RecipeError(
            say(
                f"{start} steps are done, and the recipe now has {len(tokens)}",
                f"已完成 {start} 步，而配方现在只有 {len(tokens)} 步",
            ),
            place=f"{course.stage}.stop_after",
            remedy=gate.again(),
        )
    if resume:
        were = read_manifest(resume)["conditions"]
        _check_packs(were, told["conditions"], course)
        _say_conditions(were, told["conditions"])
    if start:
        console.notice(
            say(f"continuing after step {start} of {len(tokens)}", f"从第 {start} 步（共 {len(tokens)} 步）继续")
        )
    unreached, notices, done, to_beat = list[str](), list[str](), start, untrained
    began = time.monotonic()
    with console.progress(len(tokens), course.stage, start) as bar:
        for leg in legs[current:]:
            guarded = pupil.adapted.focus(leg.stretch.parts)
            if len(legs) > 1:
                console.tell(f"{leg.stretch.train}: {len(leg.plan)} {say('steps', '步')}")
            make_ready(pupil, leg, course.lesson.store)
            unreached += _audit(pupil, course.lesson.store, leg.plan)
            watch = MetricsCallback(
                folder / "metrics.jsonl",
                tokens,
                leg.plan.steps_per_epoch,
                bar,
                leg.steps_before,
                leg.epochs_before,
                to_beat,
            )
            job = _job(course, pupil, leg, guarded, resume, evaluate, watch, told)
            done = leg.steps_before + fit(job)
            notices += job.notices
            to_beat = min((score for _, score in watch.evaluations), default=math.inf)
            resume = None
    if (budget := budget_of(pupil.model)) and (cut := budget.settle()):
        notices.append(
            say(
                f"the run ended before adalora had spent its budget: the {cut} least important ranks are cut now",
                f"训练在 adalora 分配完预算之前结束：现在裁去最不重要的 {cut} 个秩",
            )
        )
        console.notice(notices[-1])
    trained = tokens[done - 1] - (tokens[start - 1] if start else 0)
    counted, seconds = tokens[done - 1], time.monotonic() - began
    if lines := read_metrics(folder / "metrics.jsonl"):  # which counts what was before an interruption, too
        counted, seconds = lines[-1]["tokens"], lines[-1]["seconds"]
    flat = (flat_at(lines, leg.steps_before, leg.steps_before + len(leg.plan)) for leg in legs)
    return (
        {
            "steps": done,
            "tokens": tokens[done - 1],
            "tokens_this_run": trained,
            "seconds": round(seconds, 2),
            "tokens_per_second": round(counted / max(seconds, 1e-9), 2),
        },
        unreached,
        [*filter(None, flat), *notices],
    )


def _conditions(pupil: PreparedModel, leg: Phase) -> dict[str, Any]:
    """What does not change a result except in the order of floating-point sums, or in another version's arithmetic."""
    return {
        "processes": leg.plan.world,
        "device": pupil.device,
        "threads": torch.get_num_threads(),
        "micro_batch_tokens": leg.plan.budget,
        "activation_checkpointing": leg.stretch.config.activation_checkpointing,
        "compile": leg.stretch.config.compile,
        "versions": artifact.versions(),
    }


def _check_packs(before: dict[str, Any], now: dict[str, Any], course: TrainingJob) -> None:
    """A step of `batch_tokens` is as many samples as fit its packs: other packs would be other steps."""
    names = ("processes", "micro_batch_tokens")
    if course.section.batch_tokens and any(before[name] != now[name] for name in names):
        changed = "; ".join(f"{name}: {before[name]} → {now[name]}" for name in names)
        raise RecipeError(
            say(
                f"with batch_tokens, the samples of a step depend on both, and they have changed: {changed}",
                f"使用 batch_tokens 时，每步的样本取决于二者，而它们变了：{changed}",
            ),
            place=f"{course.stage}.batch_tokens",
            remedy=f"--devices {before['processes']} {course.stage}.micro_batch_tokens={before['micro_batch_tokens']}",
        )


def _say_conditions(before: dict[str, Any], now: dict[str, Any]) -> None:
    changed = ", ".join(f"{name}: {old} → {new}" for name, old, new in artifact.differences(before, now))
    if changed:
        console.notice(
            say(
                f"{changed}: the same samples in the same order, but numbers no longer equal to the bit",
                f"{changed}：样本与顺序不变，但数值不再逐位相同",
            )
        )


def _job(
    course: TrainingJob,
    pupil: PreparedModel,
    leg: Phase,
    guarded: list[torch.nn.Parameter],
    resume: Path | None,
    evaluate: Callable[[int], dict[str, Any]] | None,
    watch: MetricsCallback,
    told: dict[str, Any],
) -> TrainerJob:
    apart = leg.stretch.embedding_learning_rate != leg.stretch.learning_rate
    return TrainerJob(
        model=pupil.model,
        tokenizer=course.reader.tokenizer,
        store=course.lesson.store,
        plan=leg.plan,
        packed=pupil.packed,
        stretch=leg.stretch,
        dtype=pupil.dtype,
        seed=course.recipe.seed,
        checkpoints=leg.checkpoints,
        resume=resume,
        loss=learned_loss,
        evaluate=evaluate,
        watch=watch,
        engine=pupil.engine,
        learners=pupil.adapted.learners,
        embeddings=pupil.adapted.embeddings if apart else (),
        guarded=guarded,
        budget=budget_of(pupil.model),
        told=told,
        deadline=distributed.deadline(course.recipe.stop_before),
        evaluations=_evaluations(resume, told),
        track=_track(course, leg, watch.file.parent, told["run"], must=not resume),
    )


def _evaluations(resume: Path | None, run: dict[str, Any]) -> list[Any]:
    """Those that a checkpoint knows of; of none where other data was held out then (--fork), or an earlier version saved it."""
    before = read_manifest(resume) if resume else {"identity": {}}
    same = before["identity"].get(gate.DATA) == run["identity"][gate.DATA]
    return list(before.get("evaluations", ())) if same else []


def _track(course: TrainingJob, leg: Phase, folder: Path, run: str, *, must: bool) -> trackers.TrackerRun | None:
    """Each phase is a run of its own there: its steps are counted anew. must: nothing is trained yet that would have to go on
    without it."""
    if not course.recipe.track:
        return None
    phase = leg.checkpoints.name if len(course.section.trains) > 1 else ""
    title = "-".join(word for word in (course.recipe.name, course.stage, phase) if word)
    return trackers.TrackerRun(course.recipe.track, title, run, folder, phase, must=must and not leg.steps_before)


def _stage_below(base: str) -> dict[str, Any]:
    """The stage that made the base, as a parent of its own: so that `run` notices when it was made anew."""
    made = artifact.find(Path(base))
    return {made.kind: made.as_parent()} if made else {}


def _method(course: TrainingJob) -> str:
    method = course.section.adapter.method
    return " → ".join(
        stretch.train.replace("lora", method) if "lora" in stretch.parts else stretch.train
        for stretch in training_phases(course.section)
    )


def _open(place: load.ModelRef, dtype: torch.dtype, quantize: str) -> tuple[Any, bool, str | None]:
    """(model, whether documents are packed, fingerprint). Families that cannot pack get padded batches, and it is said."""
    config = load.load_config(place)
    family = family_of(config.model_type)
    model, fingerprint = open_adapter_chain(place, dtype, quantize)
    why = say(*family.padded) if family and family.padded else ""
    if not why and not getattr(model, "_supports_attention_backend", False):
        why = say("its attention is its own", "其注意力实现不通用")
    if not why:
        model.set_attn_implementation(packed_attention.register())
    else:
        console.notice(
            say(
                f"{config.model_type} is trained in padded batches: {why}",
                f"{config.model_type} 使用填充批次训练：{why}",
            )
        )
    model.config.use_cache = False
    return model, not why, fingerprint


def _check_lengths(config: Any, course: TrainingJob) -> None:
    """Raise RecipeError when a sample is longer than a model's table of positions: it would read beyond its end."""
    family, limit = family_of(config.model_type), chat_setup.context_length(config)
    longest = max(int(store.lengths.max()) for store in (course.lesson.store, *course.lesson.held_out_stores.values()))
    if family and family.table and longest > limit:
        raise RecipeError(
            say(
                f"a sample has {longest} tokens, and {config.model_type} has a table of {limit} positions",
                f"有样本长达 {longest} 个 token，而 {config.model_type} 的位置表只有 {limit} 行",
            ),
            place=f"{course.stage}.max_length: {course.section.max_length}",
            remedy=f"{course.stage}: {{max_length: {limit}}}",
        )


def _set_checkpointing(pupil: PreparedModel, leg: Phase, store: TokenStore) -> None:
    """Recompute activations when the recipe says so, or when the largest micro-batch does not fit a GPU otherwise."""
    word = leg.stretch.config.activation_checkpointing
    checkpointing.keep(pupil.model)
    if word == "on":
        checkpointing.recompute(pupil.model)
    elif word == "auto" and (memory := device_memory(pupil.device)) and not _fits(pupil, leg, store, memory):
        checkpointing.recompute(pupil.model)
        console.notice(
            say(
                "a micro-batch does not fit the GPU with all its activations; they are recomputed "
                "(micro_batch_tokens smaller would be faster where it suffices)",
                "一个微批的全部激活放不进 GPU；改为重算激活（若减小 micro_batch_tokens 即可放下，则更快）",
            )
        )


def _fits(pupil: PreparedModel, leg: Phase, store: TokenStore, memory: int) -> bool:
    """The largest micro-batch is tried beside room for the optimizer. Where processes share the model out, one that fails
    would leave the others waiting; there it is reckoned. memory: bytes of the GPU."""
    words = leg.stretch.config
    if words.sharded_by:
        sharing = sharing_of(words, distributed.world_size())
        return is_reckoned_to_fit(pupil.model, words, sharing, pupil.dtype.itemsize, leg.plan.budget, memory)
    learning = sum(part.numel() for part in pupil.model.parameters() if part.requires_grad)
    largest = max(leg.plan.flat(), key=lambda micro: int(store.lengths[list(micro)].sum()))
    batch = MicroBatches(store, [largest], packed=pupil.packed)[0]
    buckets = 4 * distributed.is_launched()  # DDP's copy of the gradients
    reserve = learning * (STATE_BYTES[words.optimizer] + buckets) + int(SPARE * memory)
    with console.waiting(say("trying a micro-batch on the GPU", "在 GPU 上试一个微批")):
        return fits(
            pupil.model, batch, learned_loss, pupil.computing(), passes=min(leg.plan.accumulate, 2), reserve=reserve
        )


def _score(pupil: PreparedModel, stores: dict[str, TokenStore], budget: int, sizes: torch.Tensor) -> dict[str, Any]:
    """Bits per byte of what was held out, in all and by group."""
    groups, model = {}, pupil.model
    for name, store in stores.items():
        batches = MicroBatches(store, fill(store.lengths, budget), packed=pupil.packed)
        with pupil.computing():
            stream = (audit.to_device(batches[index], model) for index in range(len(batches)))
            groups[name] = bits_per_byte(model, stream, sizes)
        if not math.isfinite(groups[name]["loss"]):
            raise NumbersError(
                say("a held-out score is NaN or infinite", "留出集得分为 NaN 或无穷"),
                place=say("held out", "留出集") + (f" · {name}" if name else ""),
                remedy=say(
                    "learning_rate lower, or precision: fp32; a base that is so from the start is not whole",
                    "降低 learning_rate，或 precision: fp32；若训练前就如此，则底座已损坏",
                ),
            )
    size, tokens = (sum(one[unit] for one in groups.values()) for unit in ("bytes", "tokens"))
    return {
        "bits_per_byte": sum(one["bits_per_byte"] * one["bytes"] for one in groups.values()) / max(size, 1),
        "loss": sum(one["loss"] * one["tokens"] for one in groups.values()) / max(tokens, 1),
        "bytes": size,
        "tokens": tokens,
        "groups": {name: one for name, one in groups.items() if name},
    }


def _answer(pupil: PreparedModel, course: TrainingJob) -> list[str]:
    """The model's own greedy answers, with the attention that generation needs."""
    model, reader = pupil.model, course.reader
    trained_with, was_training = model.config._attn_implementation, model.training
    voice = TextGenerator(model, reader.tokenizer, pupil.stops, chat_setup.context_length(model.config))
    model.eval()
    if trained_with == packed_attention.NAME:
        model.set_attn_implementation("sdpa")
    try:
        ids = [reader.encoder.encode_prompt(question.prompt) for question in course.questions]
        with pupil.computing(), checkpointing.as_written(model):
            return [voice.decode(voice.answer([one], Sampling(max_new_tokens=64))[0]).strip() for one in ids]
    finally:
        model.set_attn_implementation(trained_with)
        model.train(was_training)


def _once(file: Path, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The value that an interrupted run already made, or the first process's new one, kept for the next time."""
    if kept := _kept(file):
        return kept
    if file.is_file():
        console.notice(say(f"{file.name} cannot be read, and is made again", f"{file.name} 无法读取，重新生成"))
    value: dict[str, Any] = make()
    if distributed.is_first():
        artifact.write_json(file, value)
        return value
    while (kept := _kept(file)) is None:
        time.sleep(0.1)
    return kept


def _kept(file: Path) -> dict[str, Any] | None:
    try:
        kept = json.loads(file.read_text(encoding="utf-8"))
        return {name: kept[name] for name in ("scores", "answers")}
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _save(course: TrainingJob, pupil: PreparedModel, folder: Path, whole: dict[str, torch.Tensor] | None) -> str:
    """Adapter or model, tokenizer, template and stop tokens; returns the fingerprint of the trained tensors."""
    model = pupil.model
    if model.config._attn_implementation == packed_attention.NAME:
        model.set_attn_implementation("sdpa")
    model.config.use_cache = True
    if pupil.adapted.has_rows_alone:
        place = load.locate(course.base)
        base, _ = open_adapter_chain(place, load.load_config(place).dtype or torch.float32)
        mend_ends(course.reader.tokenizer, base, course.base)
        pupil.adapted.put_rows(base, whole)
        base.save_pretrained(str(folder))
    else:
        pupil.adapted.save(folder, whole)
    chat_setup.save_tokenizer(course.reader.tokenizer, course.template, folder)
    chat_setup.save_generation_config(model, pupil.stops, folder)
    check_adapter_saved(folder)
    return fingerprint_model(load.ModelRef(str(folder), str(folder))) or ""


def _facts(course: TrainingJob, pupil: PreparedModel, legs: list[Phase], throughput: dict[str, Any]) -> dict[str, Any]:
    section, plan = course.section, legs[0].plan
    return {
        "device": pupil.device,
        "dtype": str(pupil.dtype).removeprefix("torch."),
        "method": _method(course),
        "free": {course.stage: section.model_dump(mode="json", include=free_settings(section))},
        "steps": throughput["steps"],
        "tokens": throughput["tokens"],
        "batch": {"tokens": section.batch_tokens} if section.batch_tokens else {"samples": section.batch_size},
        "engine": pupil.engine.name,
        "micro_batches": {"accumulate": plan.accumulate, "world": plan.world, "token_budget": plan.budget},
        "stop_tokens": [course.reader.tokenizer.convert_ids_to_tokens(index) for index in pupil.stops],
        **course.facts,
    }


def _tell_answers(file: Path, step: int, questions: list[SamplePrompt], answers: list[str]) -> None:
    """samples.jsonl: what the model answers at a step; a resumed run says again what it had said beyond its checkpoint."""
    if not distributed.is_first() or not questions:
        return
    lines = [line for line in read_metrics(file) if line["step"] < step]
    lines += [
        {"step": step, "question": one.title, "answer": answer} for one, answer in zip(questions, answers, strict=True)
    ]
    beside = file.with_suffix(".partial")
    beside.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    beside.replace(file)


def _samples(
    questions: list[SamplePrompt], before: list[str], after: list[str], lines: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """The questions with all their answers. lines: of samples.jsonl, in which they stand in this order at each step."""
    ways = [lines[place :: len(questions)] for place in range(len(questions))]
    return [
        {
            "question": one.title,
            "before": old,
            "on_the_way": {line["step"]: line["answer"] for line in way},
            "after": new,
            "wanted": one.wanted,
        }
        for one, old, way, new in zip(questions, before, ways, after, strict=True)
    ]


def _books(course: TrainingJob) -> dict[str, Any]:
    """Both tables. What the first keeps is what the second takes in, or this is a bug of ours."""
    table = course.prepared.manifest["ledger"][course.reader.kind]
    encoded = course.lesson.ledger.to_dict()
    tables = {"prepare": {key: table[key] for key in ("in", "kept", "lost", "files")}, "encode": encoded}
    kept, taken = tables["prepare"]["kept"]["rows"], tables["encode"]["in"]["rows"]
    if kept != taken:
        raise AssertionError(f"prepare keeps {kept} rows, encode takes in {taken}")
    return tables


def _write(course: TrainingJob, folder: Path, report: dict[str, Any]) -> None:
    artifact.write_json(folder / "report.json", report)
    with (folder / "rejected.jsonl").open("w", encoding="utf-8") as stream:
        stream.writelines(json.dumps(bad, ensure_ascii=False) + "\n" for bad in course.lesson.rejected)
    title = f"{course.recipe.name} · {course.stage}"
    write_report(folder, title, report, read_metrics(folder / "metrics.jsonl"), dump(course.recipe))


def _say_plan(legs: list[Phase], store: TokenStore, counts: dict[str, Any]) -> None:
    plan = legs[0].plan
    steps = " + ".join(str(len(leg.plan)) for leg in legs)
    tokens = console.human_count(sum(sum(leg.plan.tokens_of(store.lengths)) for leg in legs))
    console.tell(
        say(
            f"{steps} steps, {tokens} tokens; a step is {plan.accumulate} x {plan.world} micro-batches of at most {plan.budget} tokens",
            f"{steps} 步，{tokens} token；每步 {plan.accumulate} x {plan.world} 个微批，每个至多 {plan.budget} token",
        )
    )
    for leg in legs:
        if short := unreached_rate(leg.stretch.config, len(leg.plan)):
            console.notice(short)
        every = leg.stretch.config.save_every
        if "save_every" in leg.stretch.config.model_fields_set and every >= len(leg.plan):
            console.notice(
                say(
                    f"save_every: {every}, and there are {len(leg.plan)} steps: if it is interrupted, it begins anew",
                    f"save_every: {every}，而只有 {len(leg.plan)} 步：若被中断则从头开始",
                )
            )
    console.tell(
        say(
            f"{counts['parameters']:,} of {counts['of']:,} parameters are trained ({counts['share']:.2%})",
            f"训练 {counts['parameters']:,} / {counts['of']:,} 个参数（{counts['share']:.2%}）",
        )
    )
