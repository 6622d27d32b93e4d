"""plan: show steps, tokens, memory, disk and time of a recipe. Writes nothing, and opens weights only to measure time."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tongwen.core import artifact, console
from tongwen.core.errors import RecipeError
from tongwen.core.i18n import N_, _
from tongwen.export.gguf import bytes_per_weight
from tongwen.model.kernels.recurrent import carries_state, missing_packages
from tongwen.model.loading import devices
from tongwen.model.loading.architecture import build_on_meta, load_config
from tongwen.model.loading.locate import locate
from tongwen.model.loading.tokenizer import load_tokenizer
from tongwen.model.merging.resize import plan_rows
from tongwen.recipe.memory_remedies import cheaper, last_resort
from tongwen.recipe.phases import training_phases
from tongwen.recipe.schema import Recipe
from tongwen.recipe.training import Prefer, Pretrain, Sft, Training, parts_of
from tongwen.train.memory import SHARDED_PURPOSES, STREAMED, flops_per_token, own_memory, token_budget
from tongwen.train.packing import BatchPlan, make_plan
from tongwen.train.parallel import sharding_plan
from tongwen.workflows import tokenizer_files, vocab_extension, vocab_pieces
from tongwen.workflows.new_rows import are_rows_untrained, new_rows_of
from tongwen.workflows.pipeline import Stages, check_ahead
from tongwen.workflows.record_encoders import make_dialogue_encoder, make_document_encoder, make_preference_encoder
from tongwen.workflows.stage_inputs import TRAINING, base_of_stage
from tongwen.workflows.tokenized_data import TokenizedData, encode_in_memory
from tongwen.workflows.training import memory_estimate
from tongwen.workflows.training.memory_estimate import MemoryEstimate, MicroBatch, TrainingSetup, estimate_memory
from tongwen.workflows.training.own_prompts import MAX_NEW_TOKENS, own_prompts

PURPOSES = (  # the uses of memory in an estimate
    N_("libraries"),
    N_("weights"),
    N_("gradients"),
    N_("optimizer"),
    N_("gathered"),
    N_("activations"),
    N_("head"),
    N_("blocks"),
    N_("merging"),
)


def run(recipe: Recipe, gpu: str | None, stages: Stages, *, measure: bool = False) -> int:
    """Print what a run would do and need, stage by stage. gpu: `24GB`, the memory of another GPU; measure: time a
    micro-batch of the real model on this machine."""
    limit = parse_memory(gpu) if gpu is not None else None
    if measure and limit:
        raise RecipeError(
            _("--measure measures this machine, not the GPU that --gpu names"),
            place="--measure",
            remedy=_("leave --gpu out"),
        )
    if not recipe.training or recipe.prepare is None:
        raise RecipeError(_("this recipe has no training stage"), place=recipe.name, remedy="sft: {}")
    if measure:
        import peft  # noqa: F401 (with all that it compiles, as in training; the estimate alone would import less)
    check_ahead(recipe, recipe.stages, stages)
    if recipe.vocab and not artifact.find(Path(recipe.out) / "vocab"):
        config, new = _config(recipe, recipe.base)
        console.notice(
            _(
                "vocab has not run yet: the plan counts at most {new:,} new rows, and the tokens of the base's tokenizer, which makes more"
            ).format(new=new)
        )
        if _unties(recipe, load_config(locate(recipe.base))):
            text = config.get_text_config()
            itemsize = (text.dtype or config.dtype or torch.float32).itemsize
            vocab_extension.say_untied(text.vocab_size, text.hidden_size, itemsize)
    found = {name: _plan(recipe, name, limit, measure) for name in recipe.stages if name in TRAINING}
    last = list(found.values())[-1]
    console.emit({**last, "stages": {**found, **_later_stages(recipe)}})
    return 0


def _plan(recipe: Recipe, name: str, limit: int | None, measure: bool) -> dict[str, Any]:
    """Plan one stage. If the stage before it has not run, plan with the model that exists now."""
    section: Training = getattr(recipe, name)
    device = "cuda" if limit else devices.compute_device()
    base = base_of_stage(recipe, name, finished=True)
    model_ref = locate(base)
    config, new = _config(recipe, base)
    data = _encode(recipe, section, base)
    rows = _rows(recipe, section, base, new)
    memory = 0 if recipe.devices > 1 else limit or own_memory(device)
    full = "full" in section.trained_parts
    plans = _plans(section, data, token_budget(device, config, memory, full=full), recipe.devices)
    micro = _fullest(plans, data)
    setting, needs = _estimate(config, section, _setting(section, device, limit, recipe.devices, rows), micro, limit)
    shape = needs.shape
    tokens = sum(sum(one.tokens_of(data.store.lengths)) for one in plans)
    steps = [len(one) for one in plans]
    seconds = None
    if measure:
        of_token, of_step = memory_estimate.measure(model_ref, setting, data.store, plans[-1])
        seconds = of_token * tokens / recipe.devices + of_step * sum(steps)
    elif device == "cpu":
        seconds = tokens * flops_per_token(shape, data.mask["learned_share"], full=full) / _rate()
    disk, disk_peak = _disk(config, section, setting, steps)
    remedies = list(_remedies(recipe, name, config, micro, needs.bytes["peak"], limit, rows)) if limit else []
    facts = {
        "steps": sum(steps),
        "steps_of_phases": steps,
        "steps_per_epoch": plans[-1].steps_per_epoch,
        "batch_size": None if section.batch_tokens else section.batch_size,
        "batch_tokens": section.batch_tokens,
        "padding": _padding(config, section, plans, data),
        "fill": round(plans[-1].fill(data.store.lengths), 4),
        "micro_batches_per_step": plans[-1].accumulate,
        "devices": plans[-1].world,
        "micro_batch_tokens": plans[-1].budget,
        "tokens": tokens,
        "samples": len(data.store),
        "mask": data.mask,
        "trainable": shape.trainable,
        "memory_bytes": needs.bytes,
        "dtype": str(setting.dtype).removeprefix("torch."),
        "engine": setting.sharding.engine or "single",
        "shared_out": list(SHARDED_PURPOSES.get(setting.sharding.engine, ())) if recipe.devices > 1 else [],
        "rehearsed": needs.rehearsed,
        "activation_checkpointing": setting.checkpointing,
        "disk": disk,
        "disk_bytes": disk_peak,
        "seconds": seconds,
        "fits": None if limit is None else needs.bytes["peak"] <= limit,
        "cures": remedies,
    }
    _show(name, section, facts, device, measure)
    return facts


def _padding(config: Any, section: Training, plans: Sequence[BatchPlan], data: TokenizedData) -> dict[str, Any] | None:
    """Return what the lack of packages costs whose kernels keep documents apart, as tokens computed per token of the
    data; None if nothing is missing."""
    if section.packing is False:
        return None
    model = build_on_meta(config)
    packages = missing_packages(model) if carries_state(model) else []
    if not packages:
        return None
    lengths = [data.store.lengths[list(micro)] for plan in plans for micro in plan.flat() if micro]
    padded = sum(int(each.max()) * len(each) for each in lengths)
    return {"packages": packages, "times": round(padded / sum(int(each.sum()) for each in lengths), 4)}


def _config(recipe: Recipe, base: str) -> tuple[Any, int]:
    """Return (the base's configuration, the maximum of new rows that a vocabulary stage will still add)."""
    place, section = locate(base), recipe.vocab
    config = load_config(place)
    if section is None or artifact.find(Path(recipe.out) / "vocab"):
        return config, 0
    text, used_ids = config.get_text_config(), max(load_tokenizer(place).get_vocab().values()) + 1
    new = section.pieces + len(section.words) + len(section.special_tokens)
    if section.tokenizer:
        new = len(vocab_pieces.extended_by(tokenizer_files.open_tokenizer_files(base), section.tokenizer).parts)
    ids = range(used_ids, used_ids + new)
    text.vocab_size = plan_rows(used_ids, ids, text.vocab_size, section.pad_to_multiple, shrink=section.shrink).wanted
    if _unties(recipe, config):
        config.tie_word_embeddings = text.tie_word_embeddings = False
    return config, new


def _unties(recipe: Recipe, config: Any) -> bool:
    """Whether the vocabulary stage will give the head a matrix of its own."""
    tied = config.tie_word_embeddings or config.get_text_config().tie_word_embeddings
    return bool(tied and recipe.vocab and recipe.vocab.new_rows == "matched")


def _rows(recipe: Recipe, section: Training, base: str, new: int) -> int:
    """Return the number of rows of new pieces that are trained individually. new: rows that `vocab` will still add."""
    parts = section.trained_parts
    if "new_rows" in parts:
        return new or len(new_rows_of(base))
    if isinstance(section, Sft) and parts == {"lora"} and not recipe.pretrain:  # nothing else trains the rows
        return new or (len(new_rows_of(base)) if are_rows_untrained(base) else 0)
    return 0


def _disk(config: Any, section: Training, setting: TrainingSetup, steps: list[int]) -> tuple[dict[str, int], int]:
    """Return (bytes by file kind, the peak). `saving` is the checkpoint that is written before an older one is deleted."""
    result, sizes = memory_estimate.estimate_files(config, setting, [parts_of(train) for train in section.trains])
    retained, extra = 0, 0
    for size, count in zip(sizes, steps, strict=True):
        saves = -(-count // section.save_every)
        keeps = (
            section.keep_checkpoints + 1 if section.patience else min(saves, section.keep_checkpoints)
        )  # and the best
        retained += keeps * size
        extra = max(extra, size * (saves > keeps or bool(section.patience)))
    return {"checkpoints": retained, "saving": extra, "weights": result}, retained + max(extra, result)


def _encode(recipe: Recipe, section: Training, base: str) -> TokenizedData:
    if isinstance(section, Sft):
        return encode_in_memory(recipe, make_dialogue_encoder(base, section))
    if isinstance(section, Prefer):
        return encode_in_memory(recipe, make_preference_encoder(base, section))
    assert isinstance(section, Pretrain)
    return encode_in_memory(recipe, make_document_encoder(base, section))


def _plans(section: Training, data: TokenizedData, budget: int, world: int) -> list[BatchPlan]:
    return [
        make_plan(
            data.store.lengths,
            data.draw,
            batch_size=phase.config.batch_size,
            batch_tokens=phase.config.batch_tokens,
            stop_after=phase.config.stop_after,
            budget=section.micro_batch_tokens or budget,
            world=world,
        )
        for phase in training_phases(section)
    ]


def _setting(section: Training, device: str, limit: int | None, world: int, rows: int) -> TrainingSetup:
    guessed = {"fp32": torch.float32, "fp16": torch.float16}
    dtype = (
        guessed.get(section.precision, torch.bfloat16) if limit else devices.compute_dtype(section.precision, device)[0]
    )
    checkpointing = section.activation_checkpointing == "on"
    sharding = sharding_plan(section, world)
    return TrainingSetup(
        section.adapter, section.trained_parts, dtype, device, section.optimizer, checkpointing, sharding, rows
    )


def _fullest(plans: list[BatchPlan], data: TokenizedData) -> MicroBatch:
    """Return the micro-batch with the most tokens."""
    lengths = data.store.lengths
    parts = [part for plan in plans for step in plan.micro for part in step]
    part = max(parts, key=lambda part: int(lengths[list(part)].sum()))
    rows = sum(int(np.count_nonzero(learn)) for _ids, learn in data.store.take(part))
    return MicroBatch(tuple(int(lengths[sample]) for sample in part), rows, max(plan.accumulate for plan in plans))


def _estimate(
    config: Any, section: Training, setting: TrainingSetup, micro: MicroBatch, limit: int | None
) -> tuple[TrainingSetup, MemoryEstimate]:
    """Estimate the memory, with activation checkpointing if it is allowed and the limit requires it."""
    needs = estimate_memory(config, setting, micro)
    if limit and needs.bytes["peak"] > limit and section.activation_checkpointing == "auto":
        setting = replace(setting, checkpointing=True)
        needs = estimate_memory(config, setting, micro)
    return setting, needs


def _remedies(
    recipe: Recipe, name: str, config: Any, micro: MicroBatch, peak: int, limit: int, rows: int
) -> Iterator[dict[str, Any]]:
    """Yield changes that reduce the memory: the cheapest first, each on top of those before it, until it fits."""
    peaks, total = [peak], sum(micro.lengths)

    def reduces_peak(section: Training, tokens: int) -> bool:
        smaller = micro if tokens == total else micro.cut(tokens)
        _unused, needs = _estimate(
            config, section, _setting(section, "cuda", limit, recipe.devices, rows), smaller, limit
        )
        peaks.append(min(needs.bytes["peak"], peaks[-1]))
        return peaks[-1] < peaks[-2]

    for change in cheaper(recipe, name, max(micro.lengths), total, "auto", reduces_peak) if peak > limit else ():
        yield {"change": change, "peak": peaks[-1], "fits": peaks[-1] <= limit}
        if peaks[-1] <= limit:
            return


def _later_stages(recipe: Recipe) -> dict[str, Any]:
    """Print and return the needs of merging and exporting, which both read the model a block of rows at a time."""
    found: dict[str, Any] = {}
    config, _unused = _config(recipe, base_of_stage(recipe, "sft", finished=True))
    skeleton = build_on_meta(config)
    parameters = sum(part.numel() for part in skeleton.parameters())
    needs = {"libraries": memory_estimate.LIBRARIES, "blocks": STREAMED}
    width = getattr(config.dtype, "itemsize", 4)  # a config without a dtype means fp32
    if recipe.merge:
        width = {"base": width, "fp32": 4}.get(recipe.merge.dtype, 2)
        both_models = {"weights": 2 * 4 * parameters} if recipe.merge.parity == "full" else {}
        memory = {**needs, **both_models}
        if fused := {name for section in recipe.training for name in section.adapter.target_parameters}:
            # peft's merge, in memory and in fp32: a copy of one weight and its change in addition to the model
            largest = max(part.numel() for name, part in skeleton.named_parameters() if name.endswith(tuple(fused)))
            memory = {"libraries": memory_estimate.LIBRARIES, "weights": 4 * parameters, "merging": 2 * 4 * largest}
        found["merge"] = {"memory_bytes": _summed(memory), "disk_bytes": parameters * width}
    if recipe.export:
        sizes = {"pth": width, "hf": width, "gguf": bytes_per_weight(recipe.export.quantize)}
        disk = int(sum(parameters * sizes[form] for form in recipe.export.formats))
        found["export"] = {"memory_bytes": _summed(needs), "disk_bytes": disk}
    for name, facts in found.items():
        console.header("plan", name)
        console.table(("", ""), [*_memory_rows(facts["memory_bytes"]), _disk_row(facts["disk_bytes"])])
    return found


def _summed(needs: dict[str, int]) -> dict[str, int]:
    return {**needs, "peak": sum(needs.values())}


def parse_memory(text: str) -> int:
    """`24GB` -> bytes."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([gmt])(i?)b?\s*", text.lower())
    size = int(float(found[1]) * (1024 if found[3] else 1000) ** {"m": 2, "g": 3, "t": 4}[found[2]]) if found else 0
    if not size:
        raise RecipeError(
            _("{text!r} is not an amount of memory").format(text=text), place="--gpu", remedy="--gpu 24GB"
        )
    return size


def _rate() -> float:
    """Return the floating-point operations per second that training reaches on this CPU: two thirds of the rate of matrix
    products, measured for a quarter second."""
    left, right = torch.randn(1024, 1024), torch.randn(1024, 1024)
    count, start = 0, time.monotonic()
    while (elapsed := time.monotonic() - start) < 0.25:
        left @ right
        count += 1
    return 0.66 * count * 2 * 1024**3 / elapsed


def _memory_rows(needs: dict[str, int], note: str = "") -> list[tuple[str, str]]:
    rows = [(_(name), console.human_bytes(size)) for name, size in needs.items() if name != "peak" and size > 1_000_000]
    return [*rows, (_("peak memory, about"), console.human_bytes(needs["peak"]) + note)]


def _sharing_rows(facts: dict[str, Any], section: Training) -> list[tuple[str, str]]:
    """Return a row that says whether the numbers above are per GPU, if the engine divides the model."""
    world, engine = facts["devices"], facts["engine"]
    parts = [_(name) for name in facts["shared_out"]]
    shared = _(", ").join(parts)
    if world > 1 and parts:
        scope = _("per GPU: {engine} divides {shared} among {world}").format(engine=engine, shared=shared, world=world)
    elif world > 1:
        scope = _("per GPU: {engine} divides nothing").format(engine=engine)
    elif section.sharded_by:
        scope = _("for one GPU; {engine} divides among several: --devices N").format(engine=engine)
    else:
        return []
    return [(_("all of the above"), scope)]


def _keep_rows(section: Training) -> list[tuple[str, str]]:
    """Return a row that says what `keep` costs."""
    if not section.keep:
        return []
    cost = _(
        "{count} own answers of the base, of {tokens} tokens at most, once for each base; read a few times after training; a copy of the trained weights in host memory"
    )
    return [("keep", cost.format(count=len(own_prompts()), tokens=MAX_NEW_TOKENS))]


def _disk_row(size: int) -> tuple[str, str]:
    return _("disk"), console.human_bytes(size)


def _show(name: str, section: Training, facts: dict[str, Any], device: str, measured: bool) -> None:
    batch = (
        _("{batch_tokens} tokens").format(batch_tokens=section.batch_tokens)
        if section.batch_tokens
        else _("{batch_size} samples").format(batch_size=section.batch_size)
    )
    parts, budget = f"≤ {facts['micro_batches_per_step']} x {facts['devices']}", facts["micro_batch_tokens"]
    lengths = ", ".join(str(phase.config.stop_after) for phase in training_phases(section))
    note = _(" with activation checkpointing") if facts["activation_checkpointing"] else ""
    if not facts["rehearsed"]:
        note += _(", estimated by a formula: this model allows no dry run")
    seconds, dtype = facts["seconds"], facts["dtype"]
    if facts["fits"] is not None and dtype == "bfloat16":
        dtype += _(", if that GPU supports it (none before Ampere does)")
    console.header("plan", name)
    console.table(
        ("", ""),
        [
            (_("samples"), f"{facts['samples']:,}"),
            (_("steps"), f"{' + '.join(map(str, facts['steps_of_phases']))} ({lengths})"),
            (_("tokens"), f"{facts['tokens']:,}"),
            (
                _("per step"),
                _("{what} in {parts} micro-batches of at most {budget} tokens").format(
                    what=batch, parts=parts, budget=budget
                ),
            ),
            (_("computed in"), dtype),
            *_memory_rows(facts["memory_bytes"], note),
            *_sharing_rows(facts, section),
            *_keep_rows(section),
            _disk_row(facts["disk_bytes"]),
            (
                _("time, measured") if measured else _("time on this machine, about"),
                console.human_time(seconds) if seconds else _("not known for {device}").format(device=device),
            ),
        ],
    )
    if padding := facts["padding"]:
        console.notice(
            _(
                "documents share no row without {packages}: batches are padded, and the model computes {times:.2f} times the tokens; on a GPU: pip install {packages}"
            ).format(packages=" ".join(padding["packages"]), times=padding["times"])
        )
    if facts["fits"] is not False:
        return
    console.notice(_("this does not fit; try in this order, each change on top of those before:"))
    for remedy in facts["cures"]:
        console.info(f"  {remedy['change']}  {console.human_bytes(remedy['peak'])}{' ✓' if remedy['fits'] else ''}")
    if not any(remedy["fits"] for remedy in facts["cures"]):
        console.info("  " + _("then {remedy}").format(remedy=last_resort(section)))
