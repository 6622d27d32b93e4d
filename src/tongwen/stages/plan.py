"""plan: a recipe in; steps, tokens, memory, disk and time out. Opens no weights and writes nothing."""

from __future__ import annotations

import re
import time
from typing import Any

import torch

from tongwen import console
from tongwen.errors import RecipeError
from tongwen.language import say
from tongwen.lesson import look_ahead, read_dialogues, read_documents
from tongwen.model import adapt as adapting
from tongwen.model import load
from tongwen.recipe.schema import Recipe, Sft, Training
from tongwen.river import standing_on
from tongwen.train.batches import Plan, make_plan, token_budget
from tongwen.train.memory import Shape, estimate, flops_per_token


def run(recipe: Recipe, gpu: str) -> int:
    """Print what a run would do and need, stage by stage. gpu: `24GB`, memory of a GPU that is not here."""
    if not recipe.training or recipe.prepare is None:
        raise RecipeError(
            say("there is nothing to train in this recipe", "该配方没有训练阶段"), place=recipe.name, remedy="sft: {}"
        )
    memory = parse_memory(gpu) if gpu else None
    found = {}
    for name, section in (("pretrain", recipe.pretrain), ("sft", recipe.sft)):
        if section is not None:
            found[name] = _plan(recipe, name, section, memory)
    console.emit({**list(found.values())[-1], "stages": found})
    return 0


def _plan(recipe: Recipe, name: str, section: Training, memory: int | None) -> dict[str, Any]:
    """One stage. Where a stage before it has not run, the model that it will stand on is the one that there is."""
    device = "cuda" if memory else load.compute_device()
    base = standing_on(recipe, name, finished=True)
    place = load.locate(base)
    reader = read_dialogues(base, section) if isinstance(section, Sft) else read_documents(base, section)  # type: ignore[arg-type]
    lesson = look_ahead(recipe, reader)
    store, mask = lesson.store, lesson.mask
    plans = [
        make_plan(
            store.lengths,
            lesson.draw,
            batch_size=stretch.words.batch_size,
            batch_tokens=stretch.words.batch_tokens,
            stop_after=stretch.words.stop_after,
            budget=section.micro_batch_tokens or token_budget(device),
            world=recipe.devices,
        )
        for stretch in section.stretches
    ]
    plan = plans[-1]
    shape = _shape(section, place)
    width = 2 if memory or load.compute_dtype(section.precision, device)[0] == torch.bfloat16 else 4
    full = not any("lora" in stretch.parts for stretch in section.stretches)
    needs: dict[str, int] = {}
    checkpointing = False
    for checkpointing in (section.activation_checkpointing == "on", section.activation_checkpointing != "off"):
        needs = estimate(
            shape,
            tokens=plan.budget,
            learned_share=mask["learned_share"],
            bytes_per_weight=width,
            full=full,
            checkpointing=checkpointing,
            quantize=section.adapter.quantize if section.adapter.method == "qlora" else "",
        )
        if memory is None or needs["peak"] <= memory:
            break
    tokens = sum(sum(one.tokens_of(store.lengths)) for one in plans)
    seconds = tokens * flops_per_token(shape, mask["learned_share"], full=full) / _rate() if device == "cpu" else None
    weights = shape.parameters * width
    disk = (shape.trainable * 12 if not full else shape.parameters * 12) * section.keep_checkpoints + (
        weights if recipe.merge or full else 0
    )
    steps = [len(one) for one in plans]
    _show(name, section, plan, steps, len(store), tokens, needs, checkpointing, seconds, disk, memory, device)
    return {
        "steps": sum(steps),
        "steps_of_phases": steps,
        "steps_per_epoch": plan.steps_per_epoch,
        "batch_size": None if section.batch_tokens else section.batch_size,
        "batch_tokens": section.batch_tokens,
        "fill": round(plan.fill(store.lengths), 4),
        "micro_batches_per_step": plan.accumulate,
        "devices": plan.world,
        "micro_batch_tokens": plan.budget,
        "tokens": tokens,
        "samples": len(store),
        "mask": mask,
        "trainable": shape.trainable,
        "memory_bytes": needs,
        "activation_checkpointing": checkpointing,
        "disk_bytes": disk,
        "seconds": seconds,
        "fits": None if memory is None else needs["peak"] <= memory,
    }


def parse_memory(text: str) -> int:
    """`24GB` -> bytes."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(g|gb|gib|m|mb|mib)\s*", text.lower())
    if not found:
        raise RecipeError(
            say(f"{text!r} is not an amount of memory", f"{text!r} 不是显存大小"), place="--gpu", remedy="--gpu 24GB"
        )
    return int(float(found[1]) * (1e9 if found[2].startswith("g") else 1e6))


def _shape(section: Training, place: load.Place) -> Shape:
    """Counts from a model without weights (meta device), adapted as the run would adapt it; new rows count as one."""
    from transformers import AutoModelForCausalLM

    config = load.load_config(place)
    with torch.device("meta"), load.quiet():
        model = AutoModelForCausalLM.from_config(config)
        parameters = sum(part.numel() for part in model.parameters())
        trained = {part for stretch in section.stretches for part in stretch.parts}
        adapter = section.adapter.model_copy(
            update={"continue_from": None}
        )  # the same shapes, and its files stay closed
        adapted = adapting.adapt(model, adapter, [], trained=trained, new_rows=[0], steps=100)
    return Shape(
        parameters=parameters + (adapted.counts["parameters"] if "lora" in trained else 0),
        trainable=adapted.counts["parameters"],
        layers=int(config.num_hidden_layers),
        hidden=int(config.hidden_size),
        intermediate=int(getattr(config, "intermediate_size", None) or 4 * config.hidden_size),
        vocabulary=int(config.vocab_size),
    )


def _rate() -> float:
    """Floating-point operations per second of this CPU, from a quarter second of matrix products; two thirds of it is
    what a training step reaches."""
    left, right = torch.randn(1024, 1024), torch.randn(1024, 1024)
    count, began = 0, time.monotonic()
    while (spent := time.monotonic() - began) < 0.25:
        left @ right
        count += 1
    return 0.66 * count * 2 * 1024**3 / spent


def _show(
    name: str,
    section: Training,
    plan: Plan,
    steps: list[int],
    samples: int,
    tokens: int,
    needs: dict[str, int],
    checkpointing: bool,
    seconds: float | None,
    disk: int,
    memory: int | None,
    device: str,
) -> None:
    what = (
        say(f"{section.batch_tokens} tokens", f"{section.batch_tokens} token")
        if section.batch_tokens
        else say(f"{section.batch_size} samples", f"{section.batch_size} 个样本")
    )
    console.header("plan", name)
    rows = [
        (say("samples", "样本"), f"{samples:,}"),
        (
            say("steps", "步数"),
            f"{' + '.join(map(str, steps))} ({', '.join(str(one.words.stop_after) for one in section.stretches)})",
        ),
        (say("tokens", "token 总数"), f"{tokens:,}"),
        (
            say("a step", "每步"),
            say(
                f"{what} in {plan.accumulate} x {plan.world} micro-batches of at most {plan.budget} tokens",
                f"{what}，{plan.accumulate} x {plan.world} 个微批，每个至多 {plan.budget} token",
            ),
        ),
        *((name, console.human_bytes(size)) for name, size in needs.items() if name != "peak"),
        (
            say("peak memory, about", "峰值内存约"),
            console.human_bytes(needs["peak"])
            + (say(" with activation checkpointing", "（重算激活）") if checkpointing else ""),
        ),
        (say("disk", "磁盘"), console.human_bytes(disk)),
        (
            say("time on this machine, about", "本机用时约"),
            console.human_time(seconds) if seconds else say(f"not known for {device}", f"{device} 上未知"),
        ),
    ]
    console.table(("", ""), rows)
    if memory is not None and needs["peak"] > memory:
        console.notice(
            say(
                f"this needs more than {console.human_bytes(memory)}; in this order: micro_batch_tokens {plan.budget // 2}, max_length {section.max_length // 2}, adapter.method qlora, a smaller base",
                f"超过 {console.human_bytes(memory)}；依次尝试：micro_batch_tokens {plan.budget // 2}，max_length {section.max_length // 2}，adapter.method qlora，更小的底座",
            )
        )
