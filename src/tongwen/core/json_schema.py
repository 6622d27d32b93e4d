"""Check JSON schemas and values against them: the words that the parameters of tools are written in.

Words that describe (title, description, default, examples, format) are not checked; other unknown ones are named by
`unchecked_words`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from typing import Any

from tongwen.core.i18n import _

TYPES: dict[str, Callable[[Any], bool]] = {
    "object": lambda value: isinstance(value, dict),
    "array": lambda value: isinstance(value, list),
    "string": lambda value: isinstance(value, str),
    "boolean": lambda value: isinstance(value, bool),
    "null": lambda value: value is None,
    "number": lambda value: isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value),
    "integer": lambda value: TYPES["number"](value) and value == int(value),
}
MANY = ("anyOf", "oneOf", "allOf", "prefixItems")
ONE = ("items", "additionalProperties", "not")
BY_NAME = ("properties", "$defs", "definitions", "patternProperties")
LIMITS: dict[str, tuple[str, Callable[[Any], Any], Callable[[Any, Any], bool]]] = {
    "minimum": ("number", lambda value: value, lambda value, limit: value >= limit),
    "maximum": ("number", lambda value: value, lambda value, limit: value <= limit),
    "exclusiveMinimum": ("number", lambda value: value, lambda value, limit: value > limit),
    "exclusiveMaximum": ("number", lambda value: value, lambda value, limit: value < limit),
    "minLength": ("string", len, lambda value, limit: value >= limit),
    "maxLength": ("string", len, lambda value, limit: value <= limit),
    "minItems": ("array", len, lambda value, limit: value >= limit),
    "maxItems": ("array", len, lambda value, limit: value <= limit),
}
DESCRIPTIONS = (
    "title",
    "description",
    "default",
    "examples",
    "format",
    "$schema",
    "$id",
    "$comment",
    "deprecated",
    "strict",
)
KNOWN = {
    "type",
    "enum",
    "const",
    "required",
    "pattern",
    "$ref",
    "nullable",
    *MANY,
    *ONE,
    *BY_NAME,
    *LIMITS,
    *DESCRIPTIONS,
}
DEPTH = 40  # schemas inside each other


def schema_problem(schema: Any, place: str, depth: int = 0) -> str:
    """Return the first mistake of a schema with its place, "" if it has none."""
    if isinstance(schema, bool):
        return ""
    if not isinstance(schema, dict) or depth > DEPTH:
        return f"{place}: " + (
            _("schemas lie deeper than {depth} levels").format(depth=DEPTH) if depth > DEPTH else _("not a JSON schema")
        )
    types = schema.get("type", [])
    for one in types if isinstance(types, list) else [types]:
        if not isinstance(one, str) or one not in TYPES:
            return f"{place}.type: " + _("{value!r} is none of {known}").format(value=one, known=", ".join(TYPES))
    for word, kind in {
        "required": "array",
        "enum": "array",
        "pattern": "string",
        **dict.fromkeys(LIMITS, "number"),
    }.items():
        if word in schema and not TYPES[kind](schema[word]):
            return f"{place}.{word}: " + _("not a JSON value of type {kind}").format(kind=kind)
    if not all(isinstance(name, str) for name in schema.get("required", ())):
        return f"{place}.required: " + _("not a list of names")
    try:
        re.compile(schema.get("pattern", ""))
    except re.error as error:
        return f"{place}.pattern: {error}"
    for word, value in schema.items():
        if (word in MANY and not isinstance(value, list)) or (word in BY_NAME and not isinstance(value, dict)):
            return f"{place}.{word}: " + _("not a JSON schema")
    return next(
        filter(None, (schema_problem(inner, f"{place}.{name}", depth + 1) for name, inner in _inner(schema))), ""
    )


def unchecked_words(schema: Any) -> set[str]:
    """Return the words of a schema that `value_problem` does not know."""
    if not isinstance(schema, dict):
        return set()
    return (set(schema) - KNOWN).union(*(unchecked_words(inner) for _name, inner in _inner(schema)))


def _inner(schema: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for word, value in schema.items():
        if word in MANY:
            yield from ((f"{word}.{number}", inner) for number, inner in enumerate(value))
        elif word in BY_NAME:
            yield from ((f"{word}.{name}", inner) for name, inner in value.items())
        elif word in ONE:
            yield word, value


def value_problem(value: Any, schema: Any, place: str = "$", root: Any = None) -> str:
    """Return where and how a value breaks a schema, "" if it keeps it."""
    root = schema if root is None else root
    if isinstance(schema, bool):
        return "" if schema else f"{place}: " + _("not allowed")
    if "$ref" in schema:
        return value_problem(value, _resolve(schema["$ref"], root), place, root)
    types = schema.get("type", [])
    types = types if isinstance(types, list) else [types]
    if schema.get("nullable") is True and value is None:
        return ""
    if types and not any(TYPES[one](value) for one in types):
        return f"{place}: " + _("not a JSON value of type {kind}").format(kind=" | ".join(types))
    allowed = schema["enum"] if "enum" in schema else [schema["const"]] if "const" in schema else None
    if allowed is not None and not any(same_json(value, one) for one in allowed):
        return f"{place}: " + _("{value!r} is none of {known}").format(value=value, known=allowed)
    for word, (kind, measure, holds) in LIMITS.items():
        if word in schema and TYPES[kind](value) and not holds(measure(value), schema[word]):
            return f"{place}: {word} {schema[word]}"
    if "pattern" in schema and isinstance(value, str) and not re.search(schema["pattern"], value):
        return f"{place}: pattern {schema['pattern']}"
    return _problem_inside(value, schema, place, root) or _combined_problem(value, schema, place, root)


def _problem_inside(value: Any, schema: dict[str, Any], place: str, root: Any) -> str:
    if isinstance(value, list):
        heads = schema.get("prefixItems", [])
        schemas = [*heads, *[schema.get("items", True)] * max(len(value) - len(heads), 0)]
        return next(
            filter(
                None,
                (
                    value_problem(*pair, f"{place}[{at}]", root)
                    for at, pair in enumerate(zip(value, schemas, strict=False))
                ),
            ),
            "",
        )
    if not isinstance(value, dict):
        return ""
    for name in schema.get("required", ()):
        if name not in value:
            return f"{place}.{name}: " + _("missing")
    known, patterns = schema.get("properties", {}), schema.get("patternProperties", {})
    for name, inner in value.items():
        fitting = [known[name]] if name in known else []
        fitting += [one for pattern, one in patterns.items() if re.search(pattern, name)]
        for one in fitting or [schema.get("additionalProperties", True)]:
            if problem := value_problem(inner, one, f"{place}.{name}", root):
                return problem
    return ""


def _combined_problem(value: Any, schema: dict[str, Any], place: str, root: Any) -> str:
    for word in ("allOf", "anyOf", "oneOf"):
        problems = [value_problem(value, one, place, root) for one in schema.get(word, ())]
        if word == "allOf" and any(problems):
            return next(filter(None, problems))
        fitting = problems.count("")
        if problems and word != "allOf" and (not fitting or (word == "oneOf" and fitting > 1)):
            return problems[0] or f"{place}: oneOf"
    if "not" in schema and not value_problem(value, schema["not"], place, root):
        return f"{place}: not"
    return ""


def _resolve(reference: Any, root: Any) -> Any:
    """Return the schema that `#/$defs/NAME` names; one that names none allows everything."""
    found = root
    for word in str(reference).removeprefix("#").strip("/").split("/"):
        found = found.get(word) if isinstance(found, dict) and word else found
    return found if isinstance(found, dict) and found is not root and "$ref" not in found else True


def same_json(one: Any, other: Any) -> bool:
    """Whether two JSON values are equal: 1 and 1.0 are, 1 and true are not, the order of keys is nothing."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same_json(value, other[key]) for key, value in one.items())
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(same_json, one, other))
    return isinstance(one, bool) == isinstance(other, bool) and bool(one == other)
