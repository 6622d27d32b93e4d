"""Compare an adapter's own config with the recipe. Reads no weights and imports no torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tongwen.core.errors import RecipeError
from tongwen.core.i18n import _
from tongwen.model.loading.adapter_folder import adapter_folder
from tongwen.recipe.training import AdapterConfig

# Recipe key -> peft's key.
PEFT_KEYS = {
    "rank": "r",
    "alpha": "lora_alpha",
    "dropout": "lora_dropout",
    "targets": "target_modules",
    "target_parameters": "target_parameters",
    "rslora": "use_rslora",
    "dora": "use_dora",
    "also_train": "modules_to_save",
}


def check_continued(adapter_config: AdapterConfig, stage: str) -> None:
    """Raise RecipeError when the recipe contradicts the config of an adapter that is trained further.

    Such an adapter keeps its own settings. A missing or unreadable one is reported later, when it is opened.
    """
    if not adapter_config.continue_from:
        return
    try:
        saved = json.loads(
            (adapter_folder(Path(adapter_config.continue_from)) / "adapter_config.json").read_text(encoding="utf-8")
        )
        peft = {**saved, **({"r": None, "lora_alpha": None} if saved.get("rank_pattern") else {})}  # ranks of their own
    except (OSError, ValueError, TypeError, AttributeError):
        return
    differ = [
        f"{key}: {peft[name]}"
        for key, name in PEFT_KEYS.items()
        if key in adapter_config.model_fields_set
        and name in peft
        and not _agree(getattr(adapter_config, key), peft[name])
    ]
    if differ:
        fixed = ", ".join(differ)
        raise RecipeError(
            _("this adapter was trained with {own}, which cannot change").format(own=fixed),
            place=f"{stage}.adapter.continue_from: {adapter_config.continue_from}",
            remedy=_("remove these keys; or merge it first, then train a new adapter on the merged model"),
        )


def _agree(recipe_value: Any, peft_value: Any) -> bool:
    """Whether a recipe's value and peft's agree; values that cannot be compared count as equal."""
    if isinstance(recipe_value, list) and not isinstance(peft_value, str):
        return sorted(recipe_value) == sorted(peft_value or [])
    return (
        recipe_value is None
        or peft_value is None
        or isinstance(recipe_value, str)
        or isinstance(peft_value, str)
        or recipe_value == peft_value
    )
