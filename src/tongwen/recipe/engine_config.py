"""A user's own engine file, a DeepSpeed JSON or accelerate's YAML, split into settings of the recipe and of the engine.

Such files also set batch size, optimizer, schedule and precision, mostly as "auto". These belong to the recipe: the
file's values become the recipe's settings, with a notice, and a value that contradicts the recipe is refused. The rest
goes to the engine unchanged, and what neither takes is listed.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from tongwen.core.errors import RecipeError
from tongwen.core.i18n import _
from tongwen.recipe.yaml_reader import read_foreign

SCHEDULES = {"WarmupLR": "warmup_lr", "WarmupDecayLR": "linear", "WarmupCosineLR": "cosine"}
BATCH = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
# DeepSpeed keys for which the recipe has settings.
RECIPE_KEYS = ("optimizer", "scheduler", "fp16", "bf16", "amp", "gradient_clipping", *BATCH)
OFFLOADS = ("offload_optimizer", "offload_param")
OLD_OFFLOADS = (
    ("cpu_offload", "offload_optimizer"),
    ("cpu_offload_param", "offload_param"),
    ("cpu_offload_params", "offload_param"),
)
FSDP = ("reshard_after_forward", "auto_wrap_policy", "transformer_layer_cls_to_wrap")
# Keys that FSDP2 no longer has, or that have one fixed value here.
FSDP_DROPPED = (
    "version",
    "backward_prefetch",
    "forward_prefetch",
    "sync_module_states",
    "use_orig_params",
    "state_dict_type",
    "cpu_ram_efficient_loading",
    "min_num_params",
    "backward_prefetch_policy",
    "limit_all_gathers",
)
# Keys of `zero_optimization` that shape numbers or checkpoints; the rest is speed, placement and logging.
DECIDING = re.compile(r"stage|.*quantized.*|zeropp_.*|mics_.*|zero_hpz_.*|elastic_checkpoint")
LOGGING = re.compile(
    r"steps_per_print|wall_clock_breakdown|dump_state|flops_profiler|comms_logger|tensorboard|wandb|csv_monitor|comet|"
    r"memory_breakdown|zero_allow_untested_optimizer"
)
STRATEGIES = (
    "FULL_SHARD",
    "SHARD_GRAD_OP",
    "NO_SHARD",
    "HYBRID_SHARD",
    "HYBRID_SHARD_ZERO2",
)  # in torch's order, from 1
RESHARDS = ("FULL_SHARD", "HYBRID_SHARD")
WRAPS = ("TRANSFORMER_BASED_WRAP", "NO_WRAP")
# Keys of accelerate's YAML that do not concern the training, or only where a launcher starts it.
LAUNCHER_KEYS = (
    "compute_environment",
    "debug",
    "distributed_type",
    "downcast_bf16",
    "enable_cpu_affinity",
    "fsdp_config",
    "deepspeed_config",
    "machine_rank",
    "main_process_ip",
    "main_process_port",
    "main_training_function",
    "num_machines",
    "rdzv_backend",
    "same_network",
    "tpu_env",
    "tpu_use_cluster",
    "tpu_use_sudo",
)


class EngineSettings(NamedTuple):
    """The settings of an engine file.

    settings: for the recipe; trainer: TrainingArguments; engine: for the engine; dropped: without effect.
    """

    settings: dict[str, Any]
    trainer: dict[str, Any]
    engine: dict[str, Any]
    dropped: tuple[str, ...]


def read(file: str, devices: int) -> EngineSettings:
    """Read an engine file. Raises RecipeError if it is missing, unreadable, or has an unsupported value."""
    data = _load(Path(file))
    if file.endswith(".json"):
        return _deepspeed(data, file, devices)
    kind = data.get("distributed_type", "FSDP" if "fsdp_config" in data else None)
    if kind not in ("FSDP", "DEEPSPEED"):
        raise _unknown(file, "distributed_type", kind, ("FSDP", "DEEPSPEED"), "engine: ddp")
    outside, dropped = _outside_engine(data)
    found = _accelerate_deepspeed(data, file) if kind == "DEEPSPEED" else _fsdp(data, file)
    if str(found.settings.get("engine")).endswith(".json"):  # that file has a precision of its own
        outside = {}
    return found._replace(settings=outside | found.settings, dropped=(*dropped, *found.dropped))


def deciding_settings(file: str) -> dict[str, Any]:
    """Return the settings of an engine file that change the numbers or the checkpoints."""
    engine = read(file, 1).engine
    if "zero_optimization" not in engine:
        return {}
    zero = {key: value for key, value in engine["zero_optimization"].items() if DECIDING.fullmatch(key)}
    rest = {key: value for key, value in engine.items() if not LOGGING.fullmatch(key) and key != "zero_optimization"}
    return {**rest, **zero}


def _load(file: Path) -> dict[str, Any]:
    try:
        text = file.read_text(encoding="utf-8-sig")
        data = read_foreign(text, is_json=file.suffix == ".json")
    except (OSError, ValueError) as error:
        raise RecipeError(_("cannot be read: {error}").format(error=error), place=f"engine: {file}") from None
    return _section({"": data if data is not None else "null"}, "", str(file))


def _deepspeed(data: dict[str, Any], file: str, devices: int) -> EngineSettings:
    """Read DeepSpeed's own JSON."""
    settings, trainer, dropped = _deepspeed_optimizer(data, file)
    if _section(data, "scheduler", file):
        dropped += _deepspeed_scheduler(data, file, settings)
    if data.get("gradient_clipping", "auto") != "auto":
        settings["max_grad_norm"] = data["gradient_clipping"]
    for name in ("bf16", "fp16", "amp"):
        given = _given(data, name, file)
        if _is_on(given.get("enabled", False), file, f"{name}.enabled"):
            settings |= {"precision": "bf16"} if name == "bf16" else {}
            dropped += [] if name == "bf16" else [name]
        elif name == "bf16" and "enabled" in given:
            dropped.append("bf16.enabled: false")
    batch = {key: data[key] for key in BATCH if data.get(key) not in ("auto", None)}
    for key, value in batch.items():
        if not isinstance(value, int) or isinstance(value, bool):
            raise _unknown(file, key, value, ('"auto"', _("a whole number")))
    if BATCH[0] not in batch and len(batch) == 2:
        settings["batch_size"] = batch.pop(BATCH[1]) * batch.pop(BATCH[2]) * devices
    settings |= _pop_renamed(batch, train_batch_size="batch_size")
    dropped += _lines_of(batch)
    engine = {key: value for key, value in data.items() if key not in RECIPE_KEYS}
    if str(_section(data, "zero_optimization", file).get("stage", 0)) == "0":
        return EngineSettings({**settings, "engine": "auto"}, trainer, {}, (*dropped, *_lines_of(engine)))
    return EngineSettings(settings, trainer, {**engine, "zero_optimization": _zero(data, file)}, tuple(dropped))


def _deepspeed_optimizer(data: dict[str, Any], file: str) -> tuple[dict[str, Any], dict[str, Any], list[str]]:
    """Return (settings of the recipe, TrainingArguments, unused settings) of DeepSpeed's `optimizer`."""
    optimizer = _section(data, "optimizer", file)
    kind = optimizer.get("type", "AdamW")
    if kind not in ("Adam", "AdamW"):
        raise _unknown(file, "optimizer.type", kind, ("Adam", "AdamW"))
    given = _given(optimizer, "params", file)
    settings = _pop_renamed(given, lr="learning_rate", weight_decay="weight_decay")
    trainer: dict[str, Any] = {}
    if "betas" in given:
        betas = given.pop("betas")
        if not (isinstance(betas, list) and len(betas) == 2 and all(map(_is_number, betas))):
            raise _unknown(file, "optimizer.params.betas", betas, (_("two numbers: [0.9, 0.999]"),))
        trainer |= {"adam_beta1": betas[0], "adam_beta2": betas[1]}
    if "eps" in given:
        if not _is_number(given["eps"]):
            raise _unknown(file, "optimizer.params.eps", given["eps"], ("1e-8",))
        trainer["adam_epsilon"] = given.pop("eps")
    return settings, trainer, _lines_of(given, "optimizer.params.")


def _deepspeed_scheduler(data: dict[str, Any], file: str, settings: dict[str, Any]) -> list[str]:
    """Add DeepSpeed's `scheduler` to the recipe's settings; returns the unused settings."""
    scheduler = _section(data, "scheduler", file)
    if scheduler.get("type") not in tuple(SCHEDULES):
        raise _unknown(file, "scheduler.type", scheduler.get("type"), SCHEDULES)
    settings["schedule"] = SCHEDULES[scheduler["type"]]
    given = _given(scheduler, "params", file)
    rate = given.get("warmup_max_lr", settings.get("learning_rate"))
    if settings.get("learning_rate", rate) != rate:
        raise RecipeError(
            _("{rate!r}, but optimizer.params.lr is {learning_rate!r}").format(
                rate=rate, learning_rate=settings["learning_rate"]
            ),
            place=f"engine: {file} · scheduler.params.warmup_max_lr",
            remedy=_('write "auto" for one of them'),
        )
    settings |= _pop_renamed(given, warmup_max_lr="learning_rate", warmup_num_steps="warmup")
    usual = {"warmup_min_lr": 0, "warmup_type": "log" if settings["schedule"] == "warmup_lr" else "linear"}
    return _lines_of({key: value for key, value in given.items() if usual.get(key) != value}, "scheduler.params.")


def _zero(data: dict[str, Any], file: str) -> dict[str, Any]:
    """Return `zero_optimization` with old keys replaced by current ones."""
    zero = _section(data, "zero_optimization", file)
    stage = str(zero["stage"])
    if stage not in ("1", "2", "3"):
        raise _unknown(file, "zero_optimization.stage", zero["stage"], ("0", "1", "2", "3"), "stage: 2")
    zero["stage"] = int(stage)
    for old, new in OLD_OFFLOADS:
        if _is_on(zero.pop(old, False), file, f"zero_optimization.{old}"):
            zero.setdefault(new, {"device": "cpu"})
    for old in ("cpu_offload_use_pin_memory", "stage3_gather_fp16_weights_on_model_save"):
        zero.pop(old, None)
    size = _number(zero.get("reduce_bucket_size", "auto"))
    zero |= {"reduce_bucket_size": size} if "reduce_bucket_size" in zero else {}
    if not _is_number(size) and size != "auto":
        raise _unknown(file, "zero_optimization.reduce_bucket_size", size, ('"auto"', "5e8"))
    for name in OFFLOADS:
        device = _section(zero, name, file).get("device") or "none"
        if device not in ("none", "cpu", "nvme"):
            raise _unknown(file, f"zero_optimization.{name}.device", device, ("none", "cpu", "nvme"))
        if device == "none":
            zero.pop(name, None)
    return zero


def _outside_engine(data: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return (settings of the recipe, unused settings) in accelerate's YAML outside its engine's section."""
    rest = {
        key: value
        for key, value in data.items()
        if key not in LAUNCHER_KEYS and value not in (None, False, "no", {}, [])
    }
    precision = {"no": "fp32", "False": "fp32", "bf16": "bf16"}.get(str(data.get("mixed_precision")))
    if not precision:
        return {}, _lines_of(rest)
    rest.pop("mixed_precision", None)
    return {"precision": precision}, _lines_of(rest)


def _fsdp(data: dict[str, Any], file: str) -> EngineSettings:
    """Read accelerate's `fsdp_config` of FSDP 1 or 2 as one of FSDP 2."""
    given = _section(data, "fsdp_config", file)
    config = {str(key).removeprefix("fsdp_"): value for key, value in given.items() if value not in (None, "")}
    settings: dict[str, Any] = {}
    if _is_on(config.pop("offload_params", False), file, "fsdp_offload_params"):
        settings["offload"] = True
    if _is_on(config.pop("activation_checkpointing", False), file, "fsdp_activation_checkpointing"):
        settings["activation_checkpointing"] = "on"
    key = "sharding_strategy" if "sharding_strategy" in config else "reshard_after_forward"
    strategy = config.pop(key, True)
    config.pop("reshard_after_forward", None)
    if key == "sharding_strategy" and str(strategy) in tuple("12345"):
        strategy = STRATEGIES[int(strategy) - 1]
    if strategy == "NO_SHARD":
        raise _unknown(file, f"fsdp_{key}", strategy, [name for name in STRATEGIES if name != strategy], "engine: ddp")
    if strategy in STRATEGIES:
        config["reshard_after_forward"] = strategy in RESHARDS
    else:
        config["reshard_after_forward"] = _is_on(strategy, file, f"fsdp_{key}", STRATEGIES)
    dropped = [name for name in FSDP_DROPPED if config.pop(name, None) is not None]
    if str(strategy).startswith("HYBRID"):
        dropped.append(_("{setting} (sharded over all processes)").format(setting=f"fsdp_{key}: {strategy}"))
    policy = config.get("auto_wrap_policy", WRAPS[0])
    if policy not in WRAPS:
        raise _unknown(file, "fsdp_auto_wrap_policy", policy, WRAPS, f"fsdp_auto_wrap_policy: {WRAPS[0]}")
    if layers := config.get("transformer_layer_cls_to_wrap"):
        layers = layers.replace(" ", "").split(",") if isinstance(layers, str) else layers
        if not (isinstance(layers, list) and all(isinstance(layer, str) for layer in layers)):
            raise _unknown(file, "fsdp_transformer_layer_cls_to_wrap", layers, ("LlamaDecoderLayer", "..."))
        config["transformer_layer_cls_to_wrap"] = layers
    for name in config:
        if name not in FSDP:
            remedy = _("leave it out")
            raise _unknown(file, "fsdp_config", name, (*FSDP, "offload_params", "activation_checkpointing"), remedy)
    return EngineSettings(settings, {}, config, tuple(dropped))


def _accelerate_deepspeed(data: dict[str, Any], file: str) -> EngineSettings:
    """Read accelerate's `deepspeed_config`: a few settings of the recipe, or the name of DeepSpeed's file, which then
    becomes the engine."""
    given = _section(data, "deepspeed_config", file)
    if (own := given.pop("deepspeed_config_file", "none")) not in ("none", None):
        if not str(own).endswith(".json"):
            raise _unknown(file, "deepspeed_config.deepspeed_config_file", own, ("FILE.json",))
        return EngineSettings({"engine": own}, {}, {}, tuple(_lines_of(given, "deepspeed_config.")))
    stage = str(given.get("zero_stage", 2))
    if stage not in ("0", "1", "2", "3"):
        raise _unknown(file, "deepspeed_config.zero_stage", stage, ("0", "1", "2", "3"), "engine: zero2")
    if stage != "1":  # stage 1 is listed as not used: zero2 shards the gradients too
        given.pop("zero_stage", None)
    optimizer, weights = (given.pop(f"{name}_device", None) or "none" for name in OFFLOADS)
    if stage != "3" and weights != "none":  # every process has all weights, on its device
        given["offload_param_device"], weights = weights, "none"
    if optimizer not in ("none", "cpu") or (stage == "3" and weights != optimizer):
        raise _unknown(
            file,
            "deepspeed_config.offload_optimizer_device, offload_param_device",
            f"{optimizer}, {weights}",
            (_("none or cpu; both the same with zero_stage 3"),),
            _("engine: FILE.json, DeepSpeed's own file"),
        )
    settings: dict[str, Any] = {"engine": "auto" if stage == "0" else f"zero{max(2, int(stage))}"}
    settings |= {"offload": True} if optimizer == "cpu" and stage != "0" else {}
    given.pop("zero3_save_16bit_model", None)  # always so here
    clips = given.pop("gradient_clipping", "auto")
    settings |= {"max_grad_norm": clips} if clips not in ("auto", "none", None) else {}
    return EngineSettings(settings, {}, {}, tuple(_lines_of(given, "deepspeed_config.")))


def _section(data: dict[str, Any], key: str, file: str) -> dict[str, Any]:
    """Return the mapping under a key; empty if there is none. Raises RecipeError if it is not a mapping."""
    found = data.get(key)
    if found is not None and not isinstance(found, dict):
        raise RecipeError(
            _("{found!r} must be a mapping of keys to values").format(found=found),
            place=f"engine: {file}" + (f" · {key}" if key else ""),
            remedy=_("use a DeepSpeed JSON or accelerate's YAML: docs/engines.md"),
        )
    return dict(found or {})


def _given(data: dict[str, Any], key: str, file: str) -> dict[str, Any]:
    """Return the values of a section that are not "auto"."""
    found = _section(data, key, file)
    return {name: _number(value) for name, value in found.items() if value not in ("auto", None)}


def _number(value: Any) -> Any:
    """Convert text to a number if possible: YAML 1.1 reads 1e-4 as text."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def _pop_renamed(given: dict[str, Any], **names: str) -> dict[str, Any]:
    """Remove the values of these keys; returns them under the recipe's names. names: theirs=ours."""
    return {ours: given.pop(theirs) for theirs, ours in names.items() if theirs in given}


def _lines_of(unused: dict[str, Any], prefix: str = "") -> list[str]:
    """Return unused settings as a notice names them."""
    return [f"{prefix}{key}" + ("" if isinstance(value, dict) else f": {value}") for key, value in unused.items()]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_on(value: Any, file: str, key: str, others: Iterable[str] = ()) -> bool:
    """Return a boolean from true, "true" or "True": accelerate writes all three."""
    found = {"true": True, "false": False}.get(str(value).lower())
    if found is None:
        raise _unknown(file, key, value, ("true", "false", *others))
    return found


def _unknown(file: str, key: str, value: Any, known: Iterable[str], remedy: str = "") -> RecipeError:
    known = ", ".join(known)
    return RecipeError(
        _("{value!r} is not supported; supported: {known}").format(value=value, known=known),
        place=f"engine: {file} · {key}",
        remedy=remedy or _("change it to one of these in that file"),
    )
