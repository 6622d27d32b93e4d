"""Translate other tools' settings, and the settings in an engine's own file, into the recipe's settings."""

from __future__ import annotations

import re
from typing import Any

from tongwen.core.errors import RecipeError
from tongwen.core.i18n import N_, _
from tongwen.core.nearest_names import did_you_mean, nearest_names
from tongwen.recipe import engine_config
from tongwen.recipe.aliases import LIMITS, NEEDLESS, OLD, OLD_REASONS, OWNED, training_arguments
from tongwen.recipe.training import Training
from tongwen.recipe.yaml_reader import RecipeReader, ValuePath


def translate_section(
    section: dict[str, Any], path: ValuePath, model: type[Training], devices: Any, reader: RecipeReader
) -> dict[str, Any]:
    """Return a training section with the recipe's names only.

    Args:
        section: The section as read; it is not changed.
        path: The section's path in the recipe.
        model: The schema class of the section.
        devices: The recipe's `devices` as read; a batch size per device is multiplied by it.
        reader: Collects problems, notices, and the places of new names.
    """
    section = dict(section)
    if isinstance(section.get("trainer"), dict):
        section["trainer"] = dict(section["trainer"])
        _translate_trainer(section, path, reader)
    for key in list(section):
        if key in OLD and key not in model.model_fields:
            _translate_old(section, section, key, (*path, key), reader)
    _convert_batch(section, path, devices, reader)
    if str(section.get("engine", "")).endswith((".json", ".yaml", ".yml")):
        _apply_engine_file(section, path, devices, reader)
    if isinstance(section.get("trainer"), dict):
        _check_limits(section["trainer"], (*path, "trainer"), reader)
    return section


def _translate_trainer(section: dict[str, Any], path: ValuePath, reader: RecipeReader) -> None:
    """Translate old names in `trainer`, and refuse TrainingArguments for which the recipe has its own settings."""
    trainer, known = section["trainer"], training_arguments()
    for key in list(trainer):
        key_path = (*path, "trainer", key)
        if key in OLD and key not in known:
            _translate_old(section, trainer, key, key_path, reader)
        elif key in OWNED:
            reader.add_problem(
                key_path,
                _("the recipe has its own key for {key!r}").format(key=key),
                _("instead of trainer.{key}, use: {owned}").format(key=key, owned=OWNED[key]),
            )
        elif key in NEEDLESS:
            reader.add_problem(
                key_path,
                _("the recipe needs no setting for {key!r}: {reason}").format(key=key, reason=_(NEEDLESS[key])),
                _("delete this line"),
            )
        elif known and key not in known:
            reader.add_problem(
                key_path,
                _("transformers' TrainingArguments has no field {key!r}").format(key=key),
                did_you_mean(nearest_names(key, known)),
            )
        elif known and not _fits(value := trainer[key], known[key]):
            reader.add_problem(
                key_path,
                _("{value!r} is not of type {known}").format(value=value, known=known[key]),
                _("correct the value, or leave the setting out"),
            )


def _check_limits(trainer: dict[str, Any], path: ValuePath, reader: RecipeReader) -> None:
    """Refuse numbers in `trainer`, also of an engine's file, that are out of range."""
    for key, (low, high) in LIMITS.items():
        if isinstance(value := trainer.get(key), (int, float)) and not low <= value <= high:
            reader.add_problem((*path, key), _("{value} is out of range").format(value=value), f"{low} … {high}")


def _fits(value: Any, annotation: str) -> bool:
    """Return whether a YAML value fits a field's type: a dataclass accepts any value and fails only when used."""
    names = {*re.findall(r"\w+", annotation)}
    kind = "None" if value is None else type(value).__name__
    return kind in names or (kind == "int" and "float" in names)


def _translate_old(
    section: dict[str, Any], mapping: dict[str, Any], key: str, key_path: ValuePath, reader: RecipeReader
) -> None:
    """Move an old key to its new name. mapping: holds the old key; the section or its `trainer`."""
    value, new = mapping.pop(key), OLD[key]
    if not new:
        reason = _(OLD_REASONS.get(key, N_("it has no effect any more")))
        reader.add_notice(key_path, _("{key!r} is ignored: {reason}").format(key=key, reason=reason))
    elif new in section:
        reader.add_problem(
            key_path,
            _("{key!r} and {new!r} mean the same").format(key=key, new=new),
            _("keep {new!r}").format(new=new),
        )
    else:
        section[new] = value
        reader.places[(key_path[0], new)] = reader.places.get(key_path, reader.file)
        reader.add_notice(key_path, _("{key!r} is read as `{new}: {value}`").format(key=key, new=new, value=value))


def _convert_batch(section: dict[str, Any], path: ValuePath, devices: Any, reader: RecipeReader) -> None:
    """Convert a batch size per device to `batch_size`: samples per optimizer step over all devices."""
    per_device = section.pop("per_device_train_batch_size", None)
    accumulate = section.pop("gradient_accumulation_steps", None)
    if per_device is None and accumulate is None:
        return
    key_path = (*path, "per_device_train_batch_size" if per_device is not None else "gradient_accumulation_steps")
    if "batch_size" in section:
        reader.add_problem(
            key_path,
            _("the batch size is given in both spellings"),
            _("keep `batch_size`: samples per optimizer step over all devices"),
        )
        return
    numbers = (per_device if per_device is not None else 1, accumulate if accumulate is not None else 1, devices)
    if not all(isinstance(number, int) and not isinstance(number, bool) and number >= 1 for number in numbers):
        reader.add_problem(key_path, _("these must be whole numbers of at least 1: {numbers}").format(numbers=numbers))
        return
    section["batch_size"] = numbers[0] * numbers[1] * numbers[2]
    batch_size: ValuePath = (*path, "batch_size")
    reader.places[batch_size] = reader.places.get(key_path, reader.file)
    reader.add_notice(
        key_path,
        _("{product} → `batch_size: {batch_size}` (per device x accumulation x devices)").format(
            product=" x ".join(map(str, numbers)), batch_size=section["batch_size"]
        ),
    )


def _apply_engine_file(section: dict[str, Any], path: ValuePath, devices: Any, reader: RecipeReader) -> None:
    """Copy batch, optimizer, schedule and precision from an engine's file into the section, with a notice for each."""
    file, key_path = section["engine"], (*path, "engine")
    try:
        reader.on_file(file)
        found = engine_config.read(file, devices if isinstance(devices, int) else 1)
    except RecipeError as error:
        reader.problems.append(error)
        return
    settings = dict(found.settings)
    section["engine"] = settings.pop("engine", file)
    trainer = section["trainer"] = section.get("trainer") or {}
    _merge(settings, section, path, file, reader)
    if isinstance(trainer, dict):
        _merge(found.trainer, trainer, (*path, "trainer"), file, reader)
    if found.dropped:
        reader.add_notice(
            key_path,
            _("not used; the recipe or tongwen decides: {dropped}").format(dropped=", ".join(found.dropped)),
        )
    if section["engine"] != file:
        reader.notices.append(f"{file} → `engine: {section['engine']}`")
        if section["engine"].endswith(".json"):
            _apply_engine_file(section, path, devices, reader)


def _merge(settings: dict[str, Any], target: dict[str, Any], path: ValuePath, file: str, reader: RecipeReader) -> None:
    """Add an engine file's settings to a mapping of the recipe; one that contradicts the recipe is a problem."""
    for key, value in settings.items():
        conflicting_key = "batch_tokens" if key == "batch_size" and target.get("batch_tokens") else key
        if target.get(conflicting_key, value) in (value, "auto"):
            target[key] = value
            reader.places.setdefault((*path, key), file)
            reader.notices.append(f"{file} → `{key}: {value}`")
            continue
        theirs = repr(value) if conflicting_key == key else f"{key}: {value!r}"
        reader.add_problem(
            (*path, conflicting_key),
            _("the recipe has {into!r}, but {file} has {theirs}").format(
                into=target[conflicting_key], file=file, theirs=theirs
            ),
            _('in that file, write "auto" or the same value')
            if file.endswith(".json")
            else _("in that file, leave it out or write the same value"),
        )
