"""Which settings of a training section have an effect, and which of them decide its result."""

from __future__ import annotations

from typing import Any

from tongwen.recipe import engine_config
from tongwen.recipe.training import ENGINES, AdapterConfig, Pretrain, Training


def unused_settings(section: Training) -> set[str]:
    """Return the settings that have no effect because of others."""
    unused = {
        "decay": section.schedule != "wsd",
        "batch_size": section.batch_tokens is not None,
        "train": isinstance(section, Pretrain) and section.phases,
    }
    return {name for name, applies in unused.items() if applies}


def unused_adapter_settings(section: Training) -> set[str]:
    """Return the settings of `adapter` that have no effect because of others, or of what the section trains."""
    adapter, every = section.adapter, {*AdapterConfig.model_fields}
    if adapter.part != "lora":
        return every - {"method"}
    if "lora" not in section.trained_parts:
        return every
    unused = every - {"method", "quantize", "continue_from"} if adapter.continue_from else set()
    return unused if adapter.method == "qlora" else unused | {"quantize"}


def unused_because_of(section: Training) -> str:
    """Return the setting that leaves settings of `adapter` without effect."""
    if section.adapter.continue_from:
        return "continue_from"
    if section.adapter.part == "lora" and "lora" not in section.trained_parts:
        return f"train: {section.trains[-1]}"
    return f"method: {section.adapter.method}"


def free_settings(section: Training) -> set[str]:
    """Return the settings that do not decide the result. `evaluate_every` does if an evaluation may end the run."""
    fields = type(section).model_fields
    free = {name for name in fields if dict(fields[name].json_schema_extra or {})["free"]}  # type: ignore[arg-type]
    may_end_early = section.patience is not None or (isinstance(section, Pretrain) and section.forgetting.may_stop)
    return free - {"evaluate_every"} if may_end_early else free


def deciding_settings(section: Training) -> dict[str, Any]:
    """Return the settings that decide the result, and the deciding content of the engine's own file.

    Raises:
        RecipeError: The engine's file cannot be read.
    """
    neutral = [] if section.keep else ["keep"]  # a run of version 0.1 has no such setting
    unused: dict[str, Any] = {
        **dict.fromkeys([*free_settings(section), *neutral], True),
        "adapter": unused_adapter_settings(section),
    }
    settings = section.model_dump(mode="json", exclude=unused)
    if section.engine in ENGINES:
        return settings
    return {**settings, "engine_file": engine_config.deciding_settings(section.engine)}
