"""Check JSON schemas (draft 2020-12) and the values that they describe: the parameters of tools, and the arguments of calls.

The schemas come from strangers. So a reference to another document is refused instead of fetched, depth and time have limits,
and a schema's regular expressions are not matched: one that backtracks never ends.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from functools import lru_cache
from typing import Any

from tongwen.core.errors import MissingPackage
from tongwen.core.i18n import _

DEPTH = 100  # objects and arrays inside each other: two for each schema below `properties`
SECONDS = 5.0  # for one value
DATA = ("const", "default", "enum", "examples")  # words that hold values, not schemas
MATCHED = ("pattern", "patternProperties", "unevaluatedProperties")  # words that match regular expressions
# Words that ask for nothing by themselves.
SILENT = {
    *("$anchor", "$comment", "$defs", "$dynamicAnchor", "$id", "$schema", "default", "definitions", "deprecated"),
    *("description", "else", "examples", "maxContains", "minContains", "nullable", "readOnly", "strict", "then", "title"),
    "writeOnly",
}  # fmt: skip

_deadline: ContextVar[float] = ContextVar("deadline")


@lru_cache(maxsize=1)
def _validator() -> Any:
    """Return jsonschema's validator as it is used here. Its import takes a moment. Raises MissingPackage."""
    try:
        from jsonschema import Draft202012Validator, validators
    except ImportError:
        raise MissingPackage("jsonschema", _("tools"), "serve") from None
    known = Draft202012Validator.TYPE_CHECKER
    finite = known.redefine(
        "number",
        lambda _checker, value: known.is_type(value, "number") and (isinstance(value, int) or math.isfinite(value)),
    )
    words = {word: _guarded(check) for word, check in Draft202012Validator.VALIDATORS.items() if word not in MATCHED}
    return validators.create(Draft202012Validator.META_SCHEMA, words, type_checker=finite)


def _guarded(check: Callable[..., Any]) -> Callable[..., Iterator[Any]]:
    """Return the check of a word that ends at the deadline, and passes what OpenAPI's `nullable` or a word of MATCHED allows."""

    def guarded(validator: Any, limit: Any, value: Any, schema: dict[str, Any]) -> Iterator[Any]:
        if time.monotonic() > _deadline.get():
            raise TimeoutError
        is_null = value is None and schema.get("nullable") is True
        if not is_null and not (check.__name__ == "additionalProperties" and "patternProperties" in schema):
            yield from check(validator, limit, value, schema) or ()

    return guarded


def schema_problem(schema: Any, place: str) -> str:
    """Return the first mistake of a schema with its place, "" if it has none. Raises MissingPackage."""
    validator = _validator()
    from jsonschema import FormatChecker, SchemaError

    for part, where, depth in _parts(schema, place):
        if depth > DEPTH:
            return f"{place}: " + _("schemas lie deeper than {depth} levels").format(depth=DEPTH)
        if where.endswith((".$ref", ".$dynamicRef")) and isinstance(part, str) and not _names_a_schema(part, schema):
            return f"{where}: " + _("{reference!r} is not in this schema").format(reference=part)
    _deadline.set(time.monotonic() + SECONDS)
    try:
        validator.check_schema(schema, format_checker=FormatChecker(("regex",)))
    except SchemaError as error:
        return _describe(error, place)
    except (RecursionError, OverflowError) as error:  # of a regular expression
        return f"{place}: {error}"
    return ""


def _parts(value: Any, place: str, depth: int = 0) -> Iterator[tuple[Any, str, int]]:
    """Yield each part of a schema with its place and depth, down to DEPTH."""
    yield value, place, depth
    inner = value if isinstance(value, dict) else dict(enumerate(value)) if isinstance(value, list) else {}
    for key, part in inner.items() if depth <= DEPTH else ():
        if key not in DATA:
            yield from _parts(part, f"{place}.{key}", depth + 1)


def _names_a_schema(reference: str, schema: Any) -> bool:
    from referencing import Registry, exceptions
    from referencing.jsonschema import DRAFT202012

    try:
        Registry().with_resource("", DRAFT202012.create_resource(schema)).resolver().lookup(reference)
    except exceptions.Unresolvable:
        return False
    return reference.startswith("#")


def unchecked_words(schema: Any) -> set[str]:
    """Return the words of a schema without mistakes that `value_problem` does not check."""
    from referencing.jsonschema import DRAFT202012

    found, left = set[str](), [DRAFT202012.create_resource(schema)]
    while left:
        resource = left.pop()
        if isinstance(resource.contents, dict):
            found |= resource.contents.keys() - SILENT - _validator().VALIDATORS.keys()
            left += resource.subresources()
    return found


def value_problem(value: Any, schema: Any, place: str = "$") -> str:
    """Return where and how a value breaks a schema without mistakes, "" if it keeps it."""
    from referencing import Registry, exceptions

    _deadline.set(time.monotonic() + SECONDS)
    try:
        error = next(
            _validator()(schema, registry=Registry()).iter_errors(value), None
        )  # such a registry fetches nothing
    except (TimeoutError, RecursionError, OverflowError, exceptions.Unresolvable):
        return f"{place}: " + _("the schema asks for too much to check this value")
    return _describe(error, place) if error else ""


def _describe(error: Any, place: str) -> str:
    """Return an error of jsonschema with its place; of several alternatives, what the first one lacks."""
    if error.context:
        return _describe(error.context[0], place)
    word, limit, value = error.validator, error.validator_value, error.instance
    place += "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in error.absolute_path)
    if word == "required":
        return f"{place}.{next(name for name in limit if name not in value)}: " + _("missing")
    if word == "additionalProperties":
        place += f".{next(name for name in value if name not in error.schema.get('properties', {}))}"
    if word in ("additionalProperties", None):
        return f"{place}: " + _("not allowed")
    if word == "type":
        kinds = limit if isinstance(limit, list) else [limit]
        return f"{place}: " + _("not a JSON value of type {kind}").format(kind=" | ".join(kinds))
    if word in ("enum", "const"):
        known = ", ".join(map(str, limit)) if isinstance(limit, list) else limit
        return f"{place}: " + _("{value!r} is none of {known}").format(value=value, known=known)
    if word == "format":
        return f"{place}: {error.cause}"
    return f"{place}: {word}" + ("" if isinstance(limit, (dict, list)) else f" {limit}")


def same_json(one: Any, other: Any) -> bool:
    """Whether two JSON values are equal: 1 and 1.0 are, 1 and true are not, the order of keys is nothing."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same_json(value, other[key]) for key, value in one.items())
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(same_json, one, other))
    return isinstance(one, bool) == isinstance(other, bool) and bool(one == other)
