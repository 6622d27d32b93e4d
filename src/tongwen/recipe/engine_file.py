"""A user's own engine file: a DeepSpeed JSON or accelerate's FSDP YAML, split in what a recipe says and what is the engine's.

Such files also tell batch size, optimizer, schedule and precision, mostly as "auto". These belong to the recipe: what a file
says of them becomes the recipe's words, aloud, and a value that contradicts the recipe is refused. The rest is handed to
the engine as it is.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from tongwen.errors import RecipeError
from tongwen.language import say

SCHEDULES = {"WarmupLR": "warmup_lr", "WarmupDecayLR": "linear", "WarmupCosineLR": "cosine"}
BATCH = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
RECIPES = ("optimizer", "scheduler", "fp16", "bf16", "gradient_clipping", *BATCH)  # DeepSpeed keys that a recipe says
FSDP = ("reshard_after_forward", "auto_wrap_policy", "transformer_layer_cls_to_wrap", "min_num_params")
# What FSDP2 no longer has, or what is done here in one way only.
FSDP_DROPPED = (
    "version",
    "backward_prefetch",
    "forward_prefetch",
    "sync_module_states",
    "use_orig_params",
    "state_dict_type",
    "cpu_ram_efficient_loading",
)
SHARDS_WEIGHTS = {"FULL_SHARD": True, "HYBRID_SHARD": True, "SHARD_GRAD_OP": False, "HYBRID_SHARD_ZERO2": False}


class Told(NamedTuple):
    """What a file says. words: of the recipe; trainer: TrainingArguments; engine: the rest; dropped: without effect."""

    words: dict[str, Any]
    trainer: dict[str, Any]
    engine: dict[str, Any]
    dropped: tuple[str, ...]


def read(file: str, devices: int) -> Told:
    """Read an engine file. Raises RecipeError when it is missing, unreadable, or asks for what is not here."""
    data = _load(Path(file))
    return _deepspeed(data, file, devices) if file.endswith(".json") else _fsdp(data, file)


def _load(file: Path) -> dict[str, Any]:
    try:
        text = file.read_text(encoding="utf-8-sig")
        data = json.loads(text) if file.suffix == ".json" else yaml.safe_load(text)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise RecipeError(say(f"cannot be read: {error}", f"无法读取：{error}"), place=f"engine: {file}") from None
    if not isinstance(data, dict):
        raise RecipeError(say("this is no mapping of keys to values", "应为键值映射"), place=f"engine: {file}")
    return data


def _deepspeed(data: dict[str, Any], file: str, devices: int) -> Told:
    words: dict[str, Any] = {}
    optimizer, scheduler = data.get("optimizer", {}), data.get("scheduler", {})
    kind = optimizer.get("type", "AdamW")
    if kind not in ("Adam", "AdamW"):
        raise _unknown(file, "optimizer", kind, "Adam, AdamW")
    of_optimizer = {key: value for key, value in optimizer.get("params", {}).items() if value != "auto"}
    words |= {
        ours: of_optimizer[key] for key, ours in (("lr", "learning_rate"), ("weight_decay",) * 2) if key in of_optimizer
    }
    trainer = dict(zip(("adam_beta1", "adam_beta2"), of_optimizer.get("betas", ()), strict=False))
    if "eps" in of_optimizer:
        trainer["adam_epsilon"] = of_optimizer["eps"]
    if scheduler:
        if scheduler.get("type") not in SCHEDULES:
            raise _unknown(file, "scheduler", scheduler.get("type"), ", ".join(SCHEDULES))
        words["schedule"] = SCHEDULES[scheduler["type"]]
        of_schedule = {key: value for key, value in scheduler.get("params", {}).items() if value != "auto"}
        words |= {
            ours: of_schedule[key]
            for key, ours in (("warmup_max_lr", "learning_rate"), ("warmup_num_steps", "warmup"))
            if key in of_schedule
        }
    if data.get("gradient_clipping", "auto") != "auto":
        words["max_grad_norm"] = data["gradient_clipping"]
    if data.get("bf16", {}).get("enabled") is True:
        words["precision"] = "bf16"
    whole, micro, accumulate = (data.get(key, "auto") for key in BATCH)
    if whole != "auto":
        words["batch_size"] = whole
    elif "auto" not in (micro, accumulate):
        words["batch_size"] = micro * accumulate * devices
    engine = {key: value for key, value in data.items() if key not in RECIPES}
    dropped = ("fp16",) if data.get("fp16", {}).get("enabled") is True else ()
    return Told(words, trainer, engine, dropped)


def _fsdp(data: dict[str, Any], file: str) -> Told:
    if data.get("distributed_type", "FSDP") != "FSDP" or not isinstance(data.get("fsdp_config"), dict):
        raise _unknown(file, "distributed_type", data.get("distributed_type"), "FSDP")
    config = {key.removeprefix("fsdp_"): value for key, value in data["fsdp_config"].items()}
    words: dict[str, Any] = {}
    if config.pop("offload_params", False):
        words["offload"] = True
    if config.pop("activation_checkpointing", False):
        words["activation_checkpointing"] = "on"
    precision = {"no": "fp32", "bf16": "bf16"}.get(str(data.get("mixed_precision")))
    if precision:
        words["precision"] = precision
    strategy = config.pop("sharding_strategy", config.get("reshard_after_forward", True))
    if strategy not in (True, False, *SHARDS_WEIGHTS):
        raise _unknown(file, "fsdp_sharding_strategy", strategy, ", ".join(SHARDS_WEIGHTS))
    config["reshard_after_forward"] = SHARDS_WEIGHTS.get(str(strategy), strategy)
    dropped = [key for key in FSDP_DROPPED if config.pop(key, None) is not None]
    if data.get("mixed_precision") == "fp16":
        dropped.append("mixed_precision: fp16")
    for key in config:
        if key not in FSDP:
            raise _unknown(file, "fsdp_config", key, ", ".join(FSDP))
    return Told(words, {}, config, tuple(dropped))


def _unknown(file: str, key: str, value: Any, known: str) -> RecipeError:
    return RecipeError(
        say(f"{value!r} is not known here; known are: {known}", f"不支持 {value!r}；支持：{known}"),
        place=f"engine: {file} · {key}",
    )
