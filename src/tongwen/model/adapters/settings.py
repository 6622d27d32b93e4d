"""What an adapter's own file says of it, beside what a recipe says. Reads no weights and imports no torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tongwen.core.errors import RecipeError
from tongwen.core.i18n import _
from tongwen.model.loading.load import adapter_folder
from tongwen.recipe.training import AdapterConfig

# A recipe's words for an adapter, and peft's.
OWN_WORDS = {
    "rank": "r",
    "alpha": "lora_alpha",
    "dropout": "lora_dropout",
    "targets": "target_modules",
    "target_parameters": "target_parameters",
    "rslora": "use_rslora",
    "dora": "use_dora",
    "also_train": "modules_to_save",
}


def check_further(choice: AdapterConfig, stage: str) -> None:
    """Raise RecipeError when the recipe says of an adapter that is trained further what it is not: it keeps its own words.
    One that is not there yet, or cannot be read, is refused when it is opened."""
    if not choice.continue_from:
        return
    try:
        told = json.loads(
            (adapter_folder(Path(choice.continue_from)) / "adapter_config.json").read_text(encoding="utf-8")
        )
        peft = {**told, **({"r": None, "lora_alpha": None} if told.get("rank_pattern") else {})}  # ranks of their own
    except (OSError, ValueError, TypeError, AttributeError):
        return
    differ = [
        f"{word}: {peft[name]}"
        for word, name in OWN_WORDS.items()
        if word in choice.model_fields_set and name in peft and not _agree(getattr(choice, word), peft[name])
    ]
    if differ:
        own = ", ".join(differ)
        raise RecipeError(
            _("this adapter was trained with {own}, which cannot change").format(own=own),
            place=f"{stage}.adapter.continue_from: {choice.continue_from}",
            remedy=_("remove these keys; or merge it first, then train a new adapter on the merged model"),
        )


def _agree(said: Any, own: Any) -> bool:
    """A recipe's word and peft's; what cannot be compared, agrees."""
    if isinstance(said, list) and not isinstance(own, str):
        return sorted(said) == sorted(own or [])
    return said is None or own is None or isinstance(said, str) or isinstance(own, str) or said == own
