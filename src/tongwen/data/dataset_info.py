"""Convert an entry of LLaMA-Factory's dataset_info.json to sources of a recipe, so that its folders work unchanged.

Unsupported options of an entry are refused by name: misread data is worse than none.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tongwen.core.errors import DataError
from tongwen.core.i18n import _
from tongwen.core.nearest_names import nearest_names
from tongwen.data.files import printable
from tongwen.recipe.data import SourceConfig

# formatting: {LLaMA-Factory's key under `columns`: ours}
_COLUMNS = {
    "alpaca": {
        "prompt": "instruction",
        "query": "input",
        "response": "output",
        "history": "history",
        "system": "system",
        "tools": "tools",
    },
    "sharegpt": {"messages": "conversations", "system": "system", "tools": "tools"},
    "openai": {"messages": "messages", "system": "system", "tools": "tools"},
}
_FORMATS = {"alpaca": "alpaca", "sharegpt": "conversations", "openai": "messages"}
_TURN_KEYS = {
    "sharegpt": {"role_tag": "from", "content_tag": "value"},
    "openai": {"role_tag": "role", "content_tag": "content"},
}
_ROLE_TAGS = {
    "user_tag": "user",
    "assistant_tag": "assistant",
    "observation_tag": "tool",
    "function_tag": "function_call",
    "system_tag": "system",
}
_PREFERENCE = {"chosen": "chosen", "rejected": "rejected", "kto_tag": "label"}  # `ranking: true`, or of KTO
# LLaMA-Factory does not compare the file_sha1 of older entries either.
_KNOWN = {"file_name", "hf_hub_url", "ms_hub_url", "formatting", "columns", "tags", "split", "file_sha1"}


def entry_source(source: SourceConfig, *, of_preferences: bool = False) -> list[SourceConfig]:
    """Return the sources of one entry. Settings of the recipe's source override those of the entry.

    of_preferences: the entry may be of preference data (`ranking: true`).
    """
    file = Path(source.path)
    file = file / "dataset_info.json" if file.is_dir() else file
    place = f"{printable(file)}: {source.entry}"
    entry = _entry(file, source.entry or "")
    _check_known(entry, place, _KNOWN | {"ranking"} if of_preferences else _KNOWN)
    formatting = entry.get("formatting", "alpaca")
    if formatting not in _FORMATS:
        raise DataError(
            _("formatting: {formatting!r} should be one of {formats}").format(
                formatting=formatting, formats=_(", ").join(_FORMATS)
            ),
            place=place,
        )
    columns, roles = _names(entry, formatting, place)
    changes: dict[str, Any] = {
        "path": _path(entry, file, place),
        "format": source.format or _FORMATS[formatting],
        "columns": {**columns, **source.columns},
        "roles": {**roles, **source.roles},
        "entry": None,
    }
    return [source.model_copy(update=changes)]


def _entry(file: Path, name: str) -> dict[str, Any]:
    try:
        entries = json.loads(file.read_bytes().decode("utf-8-sig"))
    except OSError as error:
        raise DataError(
            _("this cannot be opened: {strerror}").format(strerror=error.strerror), place=printable(file)
        ) from None
    except (ValueError, RecursionError) as error:
        raise DataError(_("this is not JSON: {error}").format(error=error), place=printable(file)) from None
    if not isinstance(entries, dict):
        raise DataError(
            _("dataset_info.json must be one object: {name: {file_name: …}}"),
            place=printable(file),
        )
    if name not in entries:
        near = nearest_names(name, entries, cutoff=0)
        raise DataError(
            _("there is no entry {name!r}; the closest: {near}").format(name=name, near=_(", ").join(near)),
            place=printable(file),
            remedy=f"entry: {near[0]}" if near else "",
        )
    if not isinstance(entries[name], dict):
        raise DataError(_("an entry must be an object: {file_name: …}"), place=f"{printable(file)}: {name}")
    return dict(entries[name])


def _check_known(entry: dict[str, Any], place: str, known: set[str]) -> None:
    """Raise DataError for unsupported options of the entry."""
    foreign = [key for key, value in entry.items() if key not in known and value not in (None, False)]
    if entry.get("split") not in (None, "train"):
        foreign.append("split")
    if foreign:
        raise DataError(
            _("the entry uses unsupported options: {names}").format(
                names=_(", ").join(f"{key}: {entry[key]!r}" for key in foreign)
            ),
            place=place,
            remedy=_("list it under prepare.preferences, for a `prefer` section")
            if foreign == ["ranking"]
            else _("name the file itself in the recipe: {path: …, format: …, columns: {…}}"),
        )
    for key in ("columns", "tags"):
        if not isinstance(entry.get(key, {}), dict) or not all(
            value is None or isinstance(value, str) for value in entry.get(key, {}).values()
        ):
            raise DataError(_("{word} must be an object whose values are names").format(word=key), place=place)


def _names(entry: dict[str, Any], formatting: str, place: str) -> tuple[dict[str, str], dict[str, str]]:
    """Return (columns, roles) in our names. Raises DataError for columns that we do not read."""
    ours_of = {key: ours for part in (_COLUMNS[formatting], _TURN_KEYS.get(formatting, {}), _PREFERENCE) for key, ours in part.items()}  # fmt: skip
    columns: dict[str, str] = {}
    roles: dict[str, str] = {}
    for key, theirs in {**entry.get("columns", {}), **entry.get("tags", {})}.items():
        if theirs is None:
            continue
        if key in _ROLE_TAGS:
            roles[theirs] = _ROLE_TAGS[key]
        elif key in ours_of:
            columns[ours_of[key]] = theirs
        else:
            raise DataError(
                _("formatting {formatting} does not read {word}: {theirs!r}; known: {known}").format(
                    word=key, theirs=theirs, formatting=formatting, known=_(", ").join(ours_of)
                ),
                place=place,
            )
    return {ours: theirs for ours, theirs in columns.items() if ours != theirs}, roles


def _path(entry: dict[str, Any], file: Path, place: str) -> str:
    """Return the hub data set, or the path of the file next to the JSON; the hub has priority, as in LLaMA-Factory."""
    for key, start in (("hf_hub_url", "hub:"), ("ms_hub_url", "modelscope:"), ("file_name", "")):
        value = entry.get(key)
        if isinstance(value, str) and value:
            return start + value if start else str(file.parent / value)
    raise DataError(
        _("the entry has no file_name, hf_hub_url or ms_hub_url"),
        place=place,
    )
