"""Read the config of an adapter: each field is acted upon, or known to change nothing, or refused when it asks for something.

peft decides what an adapter is, and a field that nobody reads is a sum that nobody computed. So a field that this module
does not know must be empty, or have the default of the installed peft.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tongwen.core.errors import ArtifactError, ModelError
from tongwen.core.i18n import _
from tongwen.model.loading.adapter_folder import no_adapter_config

# Fields that `read` and `merging` act upon.
READ = {
    "alpha_pattern",
    "bias",
    "ensure_weight_tying",
    "exclude_modules",
    "fan_in_fan_out",
    "init_lora_weights",
    "layers_pattern",
    "layers_to_transform",
    "lora_alpha",
    "lora_bias",
    "modules_to_save",
    "peft_type",
    "r",
    "rank_pattern",
    "target_modules",
    "target_parameters",
    "trainable_token_indices",
    "use_dora",
    "use_rslora",
}
# Fields that say where an adapter comes from and how it was trained. The sum is the same whatever they say.
IDLE = {
    "auto_mapping",
    "base_model_name_or_path",
    "corda_config",
    "eva_config",
    "inference_mode",
    "loftq_config",
    "lora_dropout",
    "lora_ga_config",
    "megatron_core",
    "merge_weights",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "task_type",
}
# Fields that a merge reads, by what they hold; any may be null.
KINDS: dict[str, tuple[type, ...]] = {
    "alpha_pattern": (dict,),
    "exclude_modules": (str, list),
    "layers_pattern": (str, list),
    "layers_to_transform": (int, list),
    "modules_to_save": (list,),
    "rank_pattern": (dict,),
    "target_modules": (str, list),
    "target_parameters": (list,),
    "trainable_token_indices": (list, dict),
}
# Values of init_lora_weights: these leave the base as it is; those change it again, in the same way each time, when peft
# opens the adapter. With any other value the base of the training cannot be known from the base alone.
STARTS = (None, True, False, "gaussian", "eva", "orthogonal", "mica")
CHANGES_BASE = ("pissa", "olora")


def read_config(folder: Path) -> dict[str, Any]:
    """Return an adapter's config. Raises ModelError when it asks for something that a merge does not do."""
    file = folder / "adapter_config.json"
    try:
        config = dict(json.loads(file.read_text(encoding="utf-8")))
    except (FileNotFoundError, NotADirectoryError):
        raise no_adapter_config(folder) from None
    except (ValueError, TypeError, RecursionError) as error:
        raise ArtifactError(_("not JSON: {error}").format(error=error), place=str(file)) from None
    if config.get("peft_type") != "LORA":
        raise ModelError(
            _("adapters of type {peft_type!r} cannot be merged into weights").format(peft_type=config.get("peft_type")),
            place=str(file),
            remedy=_("only LoRA can be; peft itself merges some other types: model.merge_and_unload()"),
        )
    for key in ("r", "lora_alpha"):
        value = config.get(key)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:  # NaN is neither
            raise ArtifactError(_("{key} is {config!r}").format(key=key, config=config.get(key)), place=str(file))
    _check_kinds(config, file)
    _check_start(config, file)
    _check_unread(config, file)
    return config


def _check_kinds(config: Mapping[str, Any], file: Path) -> None:
    for key, kinds in KINDS.items():
        value = config.get(key)
        inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        wanted = (str,) if key.endswith(("modules", "parameters", "layers_pattern", "to_save")) else (int, float, list)
        sound = all(isinstance(one, wanted) and not isinstance(one, bool) and one == one for one in inner)  # NaN
        if value is not None and not (isinstance(value, kinds) and not isinstance(value, bool) and sound):
            raise ArtifactError(_("{key} is {config!r}").format(key=key, config=value), place=str(file))


def is_lora(folder: Path) -> bool:
    """Whether an adapter is a LoRA, which `read_config` reads. Other types are peft's alone."""
    file = folder / "adapter_config.json"
    return file.is_file() and b'"LORA"' in file.read_bytes()


def is_target(config: Mapping[str, Any], module: str) -> bool:
    """Whether the config attaches a low-rank pair to a module, by peft's rules."""
    chosen, excluded = config.get("target_modules"), config.get("exclude_modules")
    saved = config.get("modules_to_save") or []
    if not chosen or is_named(excluded or [], module) or any(is_inside(name, module) for name in saved):
        return False
    return is_named(chosen, module) and (isinstance(chosen, str) or _is_in_layers(config, module))


def is_named(patterns: str | list[str], module: str) -> bool:
    """Match as peft does: a list holds name endings, a string is a regular expression for the whole name."""
    if isinstance(patterns, str):
        return bool(re.fullmatch(patterns, module))
    return any(is_called(module, pattern) for pattern in patterns)


def is_called(module: str, name: str) -> bool:
    """Match a target as peft does: by a module's whole name, or by its last components."""
    return module == name or module.endswith(f".{name}")


def is_inside(name: str, module: str) -> bool:
    """Whether a module has this name, as a part of its path: `mlp` is around `layers.0.mlp.up_proj`."""
    return f".{name}." in f".{module}."


def _is_in_layers(config: Mapping[str, Any], module: str) -> bool:
    wanted, patterns = config.get("layers_to_transform"), config.get("layers_pattern") or [r"[^.]*"]
    if wanted is None or wanted == []:
        return True
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        if found := re.match(rf"(?:^|.*?\.){pattern}\.(\d+)\.", module):
            return int(found[1]) in ([wanted] if isinstance(wanted, int) else wanted)
    return False


def _check_start(config: Mapping[str, Any], file: Path) -> None:
    start = config.get("init_lora_weights")
    if start in (*STARTS, *CHANGES_BASE):
        return
    raise ModelError(
        _("init_lora_weights is {start!r}: training began with another base, which this adapter does not hold").format(
            start=start
        ),
        place=str(file),
        remedy=_(
            "save it again as a plain LoRA (save_pretrained: path_initial_model_for_weight_conversion); or merge it onto the base as training changed it, with init_lora_weights: true in adapter_config.json"
        ),
    )


def _check_unread(config: Mapping[str, Any], file: Path) -> None:
    """Raise ModelError for a field that nothing reads and that asks for something."""
    unread = [key for key, value in config.items() if key not in READ | IDLE and value not in (None, False, "", [], {})]
    if not unread:
        return
    usual = _defaults_of_peft()
    for key in unread:
        if key not in usual or config[key] != usual[key]:
            raise ModelError(
                _("{key} is {value!r}: a merge does not do what this field asks for").format(
                    key=key, value=config[key]
                ),
                place=str(file),
                remedy=_("merge it with the program that trained it; or, if the field changes no weight, remove it"),
            )


def _defaults_of_peft() -> dict[str, Any]:
    from peft import LoraConfig

    fields = dataclasses.fields(LoraConfig)
    return {field.name: field.default for field in fields if field.default is not dataclasses.MISSING}


def adapter_type(model: Any) -> str:
    """Return peft's name for the type of a model's adapter, such as LORA; "" without an adapter."""
    config = getattr(model, "peft_config", None)
    return str(next(iter(config.values())).peft_type.value) if config else ""
