"""Read a recipe file and overrides as a frozen Recipe, or raise one error that lists every problem with its line."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from tongwen.core.errors import RecipeError
from tongwen.core.i18n import _
from tongwen.recipe.effects import unused_adapter_settings, unused_because_of, unused_settings
from tongwen.recipe.fields import read_list
from tongwen.recipe.schema import Recipe
from tongwen.recipe.training import Prefer, Pretrain, Sft, Training
from tongwen.recipe.translate import translate_section
from tongwen.recipe.validation import validate
from tongwen.recipe.yaml_reader import RecipeReader, apply_override, parse

LARGEST = 2 << 20  # characters of a recipe
ADAM = ("adam_beta1", "adam_beta2", "adam_epsilon")  # of `trainer`, for the optimizers that are AdamW


def load_recipe(
    file: str | Path, overrides: Sequence[str] = (), on_file: Callable[[str], object] = lambda name: None
) -> tuple[Recipe, list[str]]:
    """Read a recipe file with `section.key=value` overrides: see `read`."""
    return read(_text_of(Path(file)), str(file), overrides, on_file)


def read(
    text: str, name: str, overrides: Sequence[str] = (), on_file: Callable[[str], object] = lambda name: None
) -> tuple[Recipe, list[str]]:
    """Read a recipe's text.

    Args:
        text: The YAML.
        name: The file's name, for messages.
        overrides: `section.key=value`, applied in their order.
        on_file: called with the name of an engine's file before it is read; raises RecipeError to refuse it.

    Returns:
        The frozen recipe, and notices for the user (old names translated, batch sizes converted).

    Raises:
        RecipeError, or SeveralErrors with every problem, each with file and line.
    """
    reader = RecipeReader(name, on_file)
    data = parse(text, reader)
    for override in overrides:
        apply_override(data, override, reader)
    for section, model in (("pretrain", Pretrain), ("sft", Sft), ("prefer", Prefer)):
        if isinstance(data.get(section), dict):
            data[section] = translate_section(data[section], (section,), model, data.get("devices", 1), reader)
    _add_synthesized(data)
    recipe = validate(data, reader)
    notices = [*reader.notices, *(notice for section in recipe.training for notice in _notices_of_unused(section))]
    if not recipe.out:
        recipe = recipe.model_copy(update={"out": f"runs/{recipe.name}"})
    return recipe, notices


def from_options(data: Mapping[str, Any], command: str) -> Recipe:
    """Return the recipe that a command's options describe. Raises as `read` does, with the command as place."""
    return validate(data, RecipeReader(command))


def dump(recipe: Recipe) -> str:
    """Return the resolved recipe as YAML, from which a run is resumed. Defaults that have an effect are filled in;
    sections that do not run are left out."""
    sections = {"pretrain": recipe.pretrain, "sft": recipe.sft, "prefer": recipe.prefer}
    unused: Any = {
        name: {**dict.fromkeys(unused_settings(section), True), "adapter": unused_adapter_settings(section)}
        for name, section in sections.items()
        if section
    }
    data = {key: value for key, value in recipe.model_dump(mode="json", exclude=unused).items() if value is not None}
    return str(yaml.safe_dump(data, allow_unicode=True, sort_keys=False, width=100))


def _text_of(file: Path) -> str:
    try:
        with file.open(encoding="utf-8-sig") as stream:
            text = stream.read(LARGEST + 1)
    except FileNotFoundError:
        raise RecipeError(
            _("this recipe file does not exist"),
            place=str(file),
            remedy=_("`tongwen init` lists recipes to start from"),
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(_("cannot be read: {error}").format(error=error), place=str(file)) from None
    if len(text) > LARGEST:
        raise RecipeError(_("this is too large for a recipe"), place=str(file))
    return text


def _add_synthesized(data: dict[str, Any]) -> None:
    """Add the output of `synthesize` to the inputs of `prepare`, unless the recipe already lists it."""
    if data.get("synthesize") is None or not isinstance(prepare := data.get("prepare"), dict):
        return
    folder = data.get("out") or f"runs/{data.get('name')}"
    source = {"path": f"{folder}/synthesize/dialogues.jsonl", "format": "messages"}
    given = read_list(prepare.get("dialogues", []))
    if isinstance(given, list) and not any(
        isinstance(one, dict) and one.get("path") == source["path"] for one in given
    ):
        data["prepare"] = {**prepare, "dialogues": [*given, source]}


def _notices_of_unused(section: Training) -> list[str]:
    """Return notices about settings in the recipe that have no effect."""
    adapter = sorted(unused_adapter_settings(section) & section.adapter.model_fields_set)
    of_other_optimizers = {"optim_args"} if "adamw" in section.optimizer else {"optim_args", *ADAM}
    trainer = sorted(of_other_optimizers & {*section.trainer})
    found = (
        (unused_because_of(section), adapter),
        (f"optimizer: {section.optimizer}", [f"trainer.{name}" for name in trainer]),
    )
    return [
        _("`{cause}` does not use {unused}").format(cause=cause, unused=", ".join(unused))
        for cause, unused in found
        if unused
    ]
