"""`tongwen schema`: print every setting of a recipe with type, default and help, from the schema itself."""

from __future__ import annotations

import re
import types
import typing
from collections.abc import Iterator
from functools import reduce
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from tongwen.core import console
from tongwen.core.errors import RecipeError
from tongwen.core.i18n import N_, _
from tongwen.recipe.fields import Duration
from tongwen.recipe.schema import Recipe


def run(section: str) -> int:
    """Print one section or all; with --json the JSON schema of the recipe."""
    if console.SCREEN.json:
        console.emit(_translated(Recipe.model_json_schema()))
        return 0
    known = dict(sections())
    if section and section not in known:
        raise RecipeError(
            _("no section {section!r}").format(section=section),
            place="schema",
            remedy=", ".join(name for name in known if name),
        )
    for name, model in known.items():
        if section and name != section:
            continue
        console.header(name or _("recipe"), _(about(model)))
        for key, kind, default, help_ in settings(model):
            console.show(console.styled("  ", (key, "bold"), "  ", (f"{kind}  = {default}", "dim")), soft_wrap=True)
            console.show(console.styled(f"      {help_}"), soft_wrap=True)
    return 0


def _translated(schema: Any) -> Any:
    """Return a JSON schema with its descriptions in the user's language."""
    if isinstance(schema, list):
        return [_translated(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    return {
        key: _(value) if key == "description" and isinstance(value, str) else _translated(value)
        for key, value in schema.items()
    }


def sections() -> Iterator[tuple[str, type[BaseModel]]]:
    """Yield (dotted name, schema class) of all sections; the recipe itself comes first, with an empty name."""
    yield "", Recipe
    yield from _below(Recipe, "")


def about(model: type[BaseModel]) -> str:
    """Return what a section is, in English."""
    return (model.__doc__ or "").strip()


def settings(model: type[BaseModel]) -> Iterator[tuple[str, str, str, str]]:
    """Yield (key, type, default, help) of each setting of a section."""
    for key, field in model.model_fields.items():
        yield key, type_name(field.annotation), _default(field), _(field.description or "")


def to_markdown() -> str:
    """Return docs/recipe.md: all sections as tables."""
    lines = [
        _("# The recipe, key by key"),
        "",
        _("Generated from the schema by `make docs`; do not edit."),
    ]
    for name, model in sections():
        lines += ["", f"## {name or _('top level')}", "", _(about(model)), ""]
        lines += [_("| key | type | default | meaning |"), "|---|---|---|---|"]
        for row in settings(model):
            lines.append(
                "| "
                + " | ".join(cell.replace("|", "\\|") if index == 3 else f"`{cell}`" for index, cell in enumerate(row))
                + " |"
            )
    return "\n".join(lines) + "\n"


def type_name(annotation: Any) -> str:
    """Return the name of a type for users."""
    origin = typing.get_origin(annotation)
    if origin is typing.Annotated:
        return type_name(typing.get_args(annotation)[0])
    if origin is typing.Literal:
        return " / ".join(map(str, typing.get_args(annotation)))
    if origin in (typing.Union, types.UnionType):
        kinds = dict.fromkeys(type_name(part) for part in typing.get_args(annotation) if part is not type(None))
        return reduce(lambda one, other: _("{one} or {other}").format(one=one, other=other), kinds)
    if origin is list:
        return _("list of {kind}").format(kind=type_name(typing.get_args(annotation)[0]))
    if origin is dict:
        return _("mapping")
    if annotation is Duration:
        return "N epochs / steps / tokens"
    names = {str: N_("text"), int: N_("whole number"), float: N_("number"), bool: "true / false"}
    if annotation in names:
        return _(names[annotation])
    name = getattr(annotation, "__name__", str(annotation)).removesuffix("Config")
    return re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name).lower()  # SpendingLimits: spending limits


def _default(field: FieldInfo) -> str:
    value = field.default
    if value is PydanticUndefined:
        return _("required")
    if isinstance(value, BaseModel) and not isinstance(value, Duration):
        return _("see below")
    if isinstance(value, list):
        value = [entry.model_dump(exclude_unset=True) if isinstance(entry, BaseModel) else entry for entry in value]
    return (
        "-"
        if value is None or value == ""
        else str(value).lower()
        if isinstance(value, bool)
        else str(value).replace("\n", "\\n")
    )


def _below(model: type[BaseModel], prefix: str) -> Iterator[tuple[str, type[BaseModel]]]:
    for key, field in model.model_fields.items():
        for found in _models_in(field.annotation):
            name = f"{prefix}{key}"
            yield name, found
            yield from _below(found, f"{name}.")


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [] if annotation is Duration else [annotation]
    return [found for part in typing.get_args(annotation) for found in _models_in(part)]
