"""The course of a training stage: what every one of them does between its data and its folder.

The base is opened and adapted, and the audit proves on one micro-batch that each trainable tensor will learn and that
packed documents do not see each other. Then transformers' Trainer runs the plan, from the newest checkpoint when there
is one. What comes out is scored in bits per byte on what was held out, before and after, and saved with tokenizer,
template and stop tokens. What a stage alone knows stands in its `Course`.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import set_seed

from tongwen import artifact, console, launch
from tongwen.data.encode import token_bytes
from tongwen.data.ledger import table_rows
from tongwen.data.store import TokenStore
from tongwen.families import family_of
from tongwen.infer.decode import Sampling, Voice
from tongwen.language import say
from tongwen.lesson import Lesson, Reader
from tongwen.model import adapt as adapting
from tongwen.model import attention, dress, load
from tongwen.model.fingerprint import fingerprint_model, fingerprint_tokenizer
from tongwen.model.score import bits_per_byte, learned_loss
from tongwen.recipe.load import dump
from tongwen.recipe.schema import Recipe, Sft
from tongwen.train import audit
from tongwen.train.batches import MicroBatches, Plan, fill, make_plan, token_budget
from tongwen.train.fit import Job, check_adapter_saved, fit, newest_checkpoint, step_of
from tongwen.train.report import write_report
from tongwen.train.watch import Watch, peak_memory_bytes, read_metrics


class Question(NamedTuple):
    """What the model is asked before and after: a title, the prompt as text, and what the data says."""

    title: str
    prompt: str
    wanted: str


@dataclass(frozen=True)
class Course:
    """What one training stage knows of itself.

    rows:      the ids whose rows are trained beside the adapter, found on the opened base
    questions: answered before and after, for the report
    parents:   what else the result was made from, by role
    """

    recipe: Recipe
    stage: str
    base: str
    settings: dict[str, Any]
    section: Sft
    prepared: artifact.Artifact
    reader: Reader
    lesson: Lesson
    rows: Callable[[Any], list[int]]
    questions: list[Question]
    parents: dict[str, Any]


@dataclass(frozen=True)
class Pupil:
    """The adapted model with everything that it needs to read and to speak."""

    model: Any
    reader: Reader
    stops: tuple[int, ...]
    packed: bool
    counts: dict[str, Any]
    base_fingerprint: str | None
    device: str
    dtype: torch.dtype


def take(course: Course, out: Path) -> artifact.Artifact:
    """Adapt, audit, score, train, score again, save."""
    lesson, stage = course.lesson, course.stage
    _say_ledger(lesson)
    pupil = _open_pupil(course)
    plan = _make_plan(course, pupil.device)
    _say_plan(plan, lesson.store, pupil)
    unreached = _audit(pupil, lesson.store, plan)
    sizes = torch.from_numpy(token_bytes(course.reader.tokenizer))

    def score() -> dict[str, float]:
        return _score(pupil, lesson.held_out_store, plan.budget, sizes)

    def examine() -> dict[str, Any]:
        with torch.random.fork_rng(), console.waiting(say("scoring what was held out", "评测留出集")):
            return {"scores": score() if lesson.held_out_store else None, "answers": _answer(pupil, course.questions)}

    parents = {
        "prepare": course.prepared.as_parent(),
        "base": {"path": course.base, "fingerprint": pupil.base_fingerprint},
        "tokenizer": {"fingerprint": fingerprint_tokenizer(course.reader.tokenizer)},
        **course.parents,
    }
    with artifact.create(out, stage, parents, course.settings, resumable=True) as draft:
        if launch.is_first():
            artifact.write_json(draft.path / "settings.json", course.settings)
        before = _once(draft.path / "before.json", examine)
        throughput = _train(course, pupil, plan, draft.path, score if lesson.held_out_store else None)
        after = examine()
        if launch.is_first():
            draft.fingerprint = _save(pupil, draft.path)
            draft.facts = _facts(course.section, pupil, plan, throughput)
            report = {
                "summary": f"{course.base} · {course.section.adapter.method} · {len(plan)} {say('steps', '步')}",
                "ledger": _books(course),
                "mask": lesson.mask,
                "trainable": pupil.counts,
                "held_out": _held_out(before, after, lesson.held_out_store),
                "throughput": throughput,
                "peak_memory_bytes": peak_memory_bytes(),
                "unreached": unreached,
                "samples": _samples(course.questions, before["answers"], after["answers"]),
            }
            _write(course, draft.path, report)
            _say_result(report, out)
    return draft.artifact or artifact.Artifact(out, {"kind": stage, "fingerprint": ""})


def _open_pupil(course: Course) -> Pupil:
    """The base, checked against its tokenizer, with what the recipe adds to it."""
    section, reader, place = course.section, course.reader, load.locate(course.base)
    device = load.compute_device()
    dtype, why = load.compute_dtype(section.precision, device)
    with console.waiting(say("opening the base", "打开底座")):
        model, packed = _open(place, dtype if section.adapter.method != "full" else torch.float32)
        base_fingerprint = fingerprint_model(place)  # after it was opened: only then a hub's files are surely here
    load.check_tokenizer(reader.tokenizer, model, place)
    stops = dress.stop_ids(reader.tokenizer, reader.template, getattr(model, "generation_config", None))
    set_seed(course.recipe.seed)
    adapted = adapting.adapt(model, section.adapter, course.rows(model))
    for note in adapted.notices:
        console.notice(note)
    console.tell(f"{device} · {str(dtype)[6:]}: {why}")
    return Pupil(
        model=adapted.model.to(device),
        reader=reader,
        stops=stops,
        packed=packed,
        counts=adapted.counts,
        base_fingerprint=base_fingerprint,
        device=device,
        dtype=dtype,
    )


def _make_plan(course: Course, device: str) -> Plan:
    section, lesson = course.section, course.lesson
    return make_plan(
        lesson.store.lengths,
        lesson.draw,
        batch_size=section.batch_size,
        batch_tokens=section.batch_tokens,
        stop_after=section.stop_after,
        budget=section.micro_batch_tokens or token_budget(device),
        world=launch.world_size(),
    )


def _audit(pupil: Pupil, store: TokenStore, plan: Plan) -> list[str]:
    """Nothing is trained before this has passed. Returns the trainable tensors that the first tokens did not reach."""
    first = MicroBatches(store, [plan.micro[0][0]], packed=pupil.packed)[0]
    unreached = audit.probe_gradients(pupil.model, first, learned_loss)
    console.good(say("audit: gradients reach every trained tensor", "审计通过：梯度到达所有训练参数"))
    if pupil.packed and len(store) > 1:
        audit.check_isolation(pupil.model, [store.sample(0), store.sample(1)], learned_loss)
        console.good(say("audit: documents in a pack do not see each other", "审计通过：打包的文档互不可见"))
    for name in unreached:
        console.notice(say(f"no token reached {name} in the first micro-batch", f"首个微批没有 token 到达 {name}"))
    return unreached


def _train(
    course: Course, pupil: Pupil, plan: Plan, folder: Path, score: Callable[[], dict[str, float]] | None
) -> dict[str, Any]:
    """Run the plan, from the newest checkpoint if there is one; returns tokens and seconds."""
    section, lesson = course.section, course.lesson
    checkpoints = folder / "checkpoints"
    checkpoints.mkdir(exist_ok=True)
    resume = newest_checkpoint(checkpoints)
    start = step_of(resume) if resume else 0
    if start:
        console.notice(
            say(f"continuing after step {start} of {len(plan)}", f"从第 {start} 步（共 {len(plan)} 步）继续")
        )
    tokens = list(accumulate(plan.tokens_of(lesson.store.lengths)))
    began = time.monotonic()
    with console.progress(len(plan), course.stage, start) as bar:
        job = Job(
            model=pupil.model,
            tokenizer=pupil.reader.tokenizer,
            store=lesson.store,
            plan=plan,
            packed=pupil.packed,
            section=section,
            dtype=pupil.dtype,
            seed=course.recipe.seed,
            checkpoints=checkpoints,
            resume=resume,
            loss=learned_loss,
            evaluate=score,
            watch=Watch(folder / "metrics.jsonl", tokens, plan.steps_per_epoch, bar),
            checkpointing=_needs_checkpointing(section, pupil.model.config, pupil.device, plan.budget),
        )
        fit(job)
    seconds, trained = time.monotonic() - began, tokens[-1] - (tokens[start - 1] if start else 0)
    return {
        "tokens": tokens[-1],
        "tokens_this_run": trained,
        "seconds": round(seconds, 2),
        "tokens_per_second": round(trained / max(seconds, 1e-9), 2),
    }


def _open(place: load.Place, dtype: torch.dtype) -> tuple[Any, bool]:
    """(model, whether documents are packed). Families that cannot pack get padded batches, and it is said."""
    config = load.load_config(place)
    family = family_of(config.model_type)
    packs = family.packs if family else True
    model = load.load_model(place, dtype)
    packs = packs and bool(getattr(model, "_supports_attention_backend", False))
    if packs:
        model.set_attn_implementation(attention.register())
    if not packs:
        why = family.why_not if family and family.why_not else say("its attention is its own", "其注意力实现不通用")
        console.notice(
            say(
                f"{config.model_type} is trained in padded batches: {why}",
                f"{config.model_type} 使用填充批次训练：{why}",
            )
        )
    model.config.use_cache = False
    return model, packs


def _needs_checkpointing(section: Sft, config: Any, device: str, budget: int) -> bool:
    """On when the recipe says so, or when the activations of a micro-batch would not fit into the free GPU memory.

    About 34 numbers of the hidden width are kept per token and layer without it (performance notes of Megatron-LM,
    arXiv 2205.05198, without the attention scores that fused attention never stores)."""
    if section.activation_checkpointing != "auto" or device != "cuda":
        return section.activation_checkpointing == "on"
    free, _ = torch.cuda.mem_get_info()
    return bool(budget * config.num_hidden_layers * config.hidden_size * 34 * 2 > 0.8 * free)


def _score(pupil: Pupil, store: TokenStore | None, budget: int, sizes: torch.Tensor) -> dict[str, float]:
    """Bits per byte of what was held out."""
    assert store is not None
    batches = MicroBatches(store, fill(store.lengths, budget), packed=pupil.packed)
    model = pupil.model
    return bits_per_byte(model, (audit.to_device(batches[index], model) for index in range(len(batches))), sizes)


def _answer(pupil: Pupil, questions: list[Question]) -> list[str]:
    """The model's own greedy answers, with the attention that generation needs."""
    model, reader = pupil.model, pupil.reader
    trained_with, was_training = model.config._attn_implementation, model.training
    voice = Voice(model, reader.tokenizer, pupil.stops, dress.context_length(model.config))
    model.eval()
    if trained_with == attention.NAME:
        model.set_attn_implementation("sdpa")
    try:
        ids = [reader.encoder.encode_prompt(question.prompt) for question in questions]
        return [voice.decode(voice.answer([one], Sampling(max_new_tokens=64))[0]).strip() for one in ids]
    finally:
        model.set_attn_implementation(trained_with)
        model.train(was_training)


def _once(file: Path, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The value that an interrupted run already made, or a new one, kept for the next time."""
    if file.is_file():
        return dict(json.loads(file.read_text(encoding="utf-8")))
    value: dict[str, Any] = make()
    if launch.is_first():
        artifact.write_json(file, value)
    return value


def _save(pupil: Pupil, folder: Path) -> str:
    """Adapter or model, tokenizer, template and stop tokens; returns the fingerprint of the trained tensors."""
    model = pupil.model
    if model.config._attn_implementation == attention.NAME:
        model.set_attn_implementation("sdpa")
    model.config.use_cache = True
    model.save_pretrained(str(folder))
    dress.save_tokenizer(pupil.reader.tokenizer, pupil.reader.template, folder)
    dress.save_generation_config(model, pupil.stops, folder)
    check_adapter_saved(folder)
    return fingerprint_model(load.Place(str(folder), str(folder))) or ""


def _facts(section: Sft, pupil: Pupil, plan: Plan, throughput: dict[str, Any]) -> dict[str, Any]:
    return {
        "device": pupil.device,
        "dtype": str(pupil.dtype).removeprefix("torch."),
        "steps": len(plan),
        "tokens": throughput["tokens"],
        "batch": {"tokens": section.batch_tokens} if section.batch_tokens else {"samples": section.batch_size},
        "micro_batches": {"accumulate": plan.accumulate, "world": plan.world, "token_budget": plan.budget},
        "stop_tokens": [pupil.reader.tokenizer.convert_ids_to_tokens(index) for index in pupil.stops],
        "template_name": section.template,
    }


def _samples(questions: list[Question], before: list[str], after: list[str]) -> list[dict[str, str]]:
    return [
        {"question": one.title, "before": old, "after": new, "wanted": one.wanted}
        for one, old, new in zip(questions, before, after, strict=True)
    ]


def _held_out(before: dict[str, Any], after: dict[str, Any], store: TokenStore | None) -> dict[str, Any] | None:
    if store is None:
        return None
    old, new = before["scores"], after["scores"]
    return {
        "bits_per_byte": {"before": old["bits_per_byte"], "after": new["bits_per_byte"]},
        "loss": {"before": old["loss"], "after": new["loss"]},
        "samples": len(store),
        "bytes": new["bytes"],
        "tokens": new["tokens"],
    }


def _books(course: Course) -> dict[str, Any]:
    """Both tables. What the first keeps is what the second takes in, or this is a bug of ours."""
    table = course.prepared.manifest["ledger"]["dialogues"]
    encoded = course.lesson.ledger.to_dict()
    tables = {"prepare": {key: table[key] for key in ("in", "kept", "lost", "files")}, "encode": encoded}
    kept, taken = tables["prepare"]["kept"]["rows"], tables["encode"]["in"]["rows"]
    if kept != taken:
        raise AssertionError(f"prepare keeps {kept} rows, encode takes in {taken}")
    return tables


def _write(course: Course, folder: Path, report: dict[str, Any]) -> None:
    artifact.write_json(folder / "report.json", report)
    with (folder / "rejected.jsonl").open("w", encoding="utf-8") as stream:
        stream.writelines(json.dumps(bad, ensure_ascii=False) + "\n" for bad in course.lesson.rejected)
    title = f"{course.recipe.name} · {course.stage}"
    write_report(folder, title, report, read_metrics(folder / "metrics.jsonl"), dump(course.recipe))


def _say_ledger(lesson: Lesson) -> None:
    rows = table_rows(lesson.ledger.to_dict(), say("encode", "编码"), say("trained", "训练"))
    console.table((say("ledger", "账目"), say("rows", "行"), "token"), rows)
    mask, rejected = lesson.mask, lesson.rejected
    console.tell(
        say(
            f"{mask['learned_share']:.0%} of the tokens are learned; {mask['stop_learned_share']:.0%} of the samples learn to stop",
            f"{mask['learned_share']:.0%} 的 token 计入损失；{mask['stop_learned_share']:.0%} 的样本学到停止符",
        )
    )
    if mask["round_trip"]["differ"]:
        console.notice(
            say(
                "{differ} of {checked} samples do not decode to their own text: the tokenizer lacks characters".format(
                    **mask["round_trip"]
                ),
                "{checked} 个样本中有 {differ} 个无法解码回原文：分词器缺少字符".format(**mask["round_trip"]),
            )
        )
    if rejected:
        first = rejected[0]
        console.notice(
            say(
                f"{len(rejected)} samples are not trained, the first: {first['file']}:{first['row']}: {first['rule']}",
                f"{len(rejected)} 个样本未参与训练，第一个：{first['file']}:{first['row']}: {first['rule']}",
            )
        )


def _say_plan(plan: Plan, store: TokenStore, pupil: Pupil) -> None:
    tokens, counts = console.human_count(sum(plan.tokens_of(store.lengths))), pupil.counts
    console.tell(
        say(
            f"{len(plan)} steps, {tokens} tokens; a step is {plan.accumulate} x {plan.world} micro-batches of at most {plan.budget} tokens",
            f"{len(plan)} 步，{tokens} token；每步 {plan.accumulate} x {plan.world} 个微批，每个至多 {plan.budget} token",
        )
    )
    console.tell(
        say(
            f"{counts['parameters']:,} of {counts['of']:,} parameters are trained ({counts['share']:.2%})",
            f"训练 {counts['parameters']:,} / {counts['of']:,} 个参数（{counts['share']:.2%}）",
        )
    )


def _say_result(report: dict[str, Any], out: Path) -> None:
    through = report["throughput"]
    if held_out := report["held_out"]:
        scores = held_out["bits_per_byte"]
        change = (scores["after"] / scores["before"] - 1) if scores["before"] else math.nan
        console.good(
            say(
                f"held-out bits per byte {scores['before']:.3f} → {scores['after']:.3f} ({change:+.1%})",
                f"留出集 bits per byte {scores['before']:.3f} → {scores['after']:.3f}（{change:+.1%}）",
            )
        )
    console.good(
        f"{console.human_time(through['seconds'])} · {through['tokens_per_second']:.0f} token/s · "
        f"{say('peak', '峰值')} {console.human_bytes(report['peak_memory_bytes'])} · {out / 'report.html'}"
    )
