"""Validate values as a Recipe, or report problems with place, value, rule and remedy."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, cast

from pydantic import BaseModel, ValidationError

from tongwen.core.errors import raise_all
from tongwen.core.i18n import _
from tongwen.core.nearest_names import did_you_mean, nearest_names
from tongwen.recipe.schema import Recipe
from tongwen.recipe.yaml_reader import RecipeReader, ValuePath


def validate(data: Mapping[str, Any], reader: RecipeReader) -> Recipe:
    """Return the data as a recipe. Raises RecipeError, or SeveralErrors with every problem of this reading."""
    recipe = None
    try:
        recipe = Recipe.model_validate(data)
    except ValidationError as error:
        for found in error.errors(include_url=False):
            _explain(found, data, reader)
    raise_all(reader.problems)
    assert recipe is not None
    return recipe


def _explain(error: Any, data: Any, reader: RecipeReader) -> None:
    """Add a problem in our own words for one pydantic error."""
    path = _plain_path(error["loc"], data)
    kind, value = error["type"], error.get("input")
    key = str(path[-1]) if path else ""
    if kind == "extra_forbidden":
        known = list(_section_at(path[:-1]).model_fields)
        near = nearest_names(key, known, 1 if len(known) > 9 else 3)
        remedy = did_you_mean(near) or _("available: {names}").format(names=", ".join(known))
        reader.add_problem(path, _("no such key: {key!r}").format(key=key), remedy)
    elif kind == "missing":
        reader.add_problem(path, _("the key {key!r} is required").format(key=key), _help_of(path))
    elif kind == "tongwen":
        reader.add_problem(path, error["msg"])
    elif kind == "literal_error":
        choices = error["ctx"]["expected"].replace("'", "")
        near = nearest_names(str(value), re.split(r", | or ", choices), 1)
        rule = _("{value!r} is not one of: {choices}").format(value=value, choices=choices)
        reader.add_problem(path, rule, did_you_mean(near))
    else:
        limit = error["msg"].removeprefix("Input ").replace("should be", _("must be"))
        place = reader.place(path)
        if not any(known.place == place for known in reader.problems):  # a union reports each of its branches
            shown = f"{value!r}"[:80]
            reader.add_problem(path, _("{value} {limit}").format(value=shown, limit=limit), _help_of(path))


def _plain_path(location: Sequence[str | int], data: Any) -> ValuePath:
    """Return pydantic's location without the tags of union branches: only keys and indexes that exist in the data."""
    path: list[str | int] = []
    value: Any = data
    for index, part in enumerate(location):
        if (isinstance(value, dict) and part in value) or (
            isinstance(value, list) and isinstance(part, int) and part < len(value)
        ):
            value = cast("Any", value)[part]
            path.append(part)
        elif isinstance(value, dict) and index == len(location) - 1:
            path.append(part)
    return tuple(path)


def _section_at(path: ValuePath) -> type[BaseModel]:
    """Return the schema class that holds the keys at a path."""
    section: type[BaseModel] = Recipe
    for part in path:
        if isinstance(part, int):
            continue
        field = section.model_fields.get(part)
        found = _sections_in(field.annotation) if field else []
        if not found:
            return section
        section = found[0]
    return section


def _sections_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [found for inner in getattr(annotation, "__args__", ()) for found in _sections_in(inner)]


def _help_of(path: ValuePath) -> str:
    """Return the help of the setting at a path; empty if there is none."""
    names = [part for part in path if isinstance(part, str)]
    field = _section_at(path[:-1]).model_fields.get(names[-1]) if names else None
    if field is None:
        return ""
    return f"{names[-1]}: " + _(field.description or "")
