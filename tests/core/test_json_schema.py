"""Schemas of strangers: mistakes have a place, nothing is fetched, and no check runs without end."""

from __future__ import annotations

import json
import sys
from typing import Any

import pytest

from tongwen.core import json_schema
from tongwen.core.errors import MissingPackage
from tongwen.core.json_schema import schema_problem, unchecked_words, value_problem


def nested(levels: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(levels):
        schema = {"properties": {"x": schema}}
    return schema


@pytest.mark.parametrize(
    ("schema", "problem"),
    [
        (True, ""),
        ({"properties": {"$ref": {"type": "string"}}, "default": {"$ref": "http://x/y"}}, ""),
        ({"$defs": {"a": {"type": "string"}}, "items": {"$ref": "#/$defs/a"}}, ""),
        (nested(49), ""),
        (3, "p: not a JSON value of type object | boolean"),
        ({"anyOf": [{"type": "x"}]}, "p.anyOf[0].type: 'x' is none of array, boolean"),
        ({"minLength": "a"}, "p.minLength: not a JSON value of type integer"),
        ({"required": ["a", "a"]}, "p.required: uniqueItems"),
        ({"properties": {"x": {"pattern": "(" * 5000 + ")" * 5000}}}, "p: maximum recursion depth"),
        ({"pattern": "a{99999999999999999999}"}, "p: the repetition number"),
        ({"patternProperties": {"(": {}}}, "p.patternProperties: missing )"),
        ({"items": {"$ref": "#/$defs/b"}}, "p.items.$ref: '#/$defs/b' is not in this schema"),
        ({"$ref": "file:///etc/passwd"}, "p.$ref: 'file:///etc/passwd' is not in this schema"),
        (nested(51), "p: schemas lie deeper than 100 levels"),
    ],
)
def test_first_mistake_of_a_schema_has_a_place(schema: Any, problem: str) -> None:
    found = schema_problem(schema, "p")
    assert found == "" if not problem else found.startswith(problem)


@pytest.mark.parametrize(
    ("value", "schema", "problem"),
    [
        ({"x": {"y": [1, "b"]}}, {"properties": {"x": {"properties": {"y": {"items": {"type": "integer"}}}}}}, "f.x.y[1]: not a JSON value of type integer"),
        ({"z": 2}, {"required": ["z", "y"]}, "f.y: missing"),
        ({"a": 1, "z": 2}, {"properties": {"a": {}}, "additionalProperties": False}, "f.z: not allowed"),
        ({"a": 1}, {"properties": {"a": False}}, "f: not allowed"),
        (True, {"enum": [1]}, "f: True is none of 1"),
        (1.0, {"const": 1}, ""),
        ("a", {"anyOf": [{"type": "null"}, {"type": "integer"}]}, "f: not a JSON value of type null"),
        (3, {"oneOf": [{}, {"type": "integer"}]}, "f: oneOf"),
        (None, {"type": "string", "enum": ["a"], "nullable": True}, ""),
        (json.loads("NaN"), {"type": "number"}, "f: not a JSON value of type number"),
        (10**400, {"type": "number", "maximum": 1.5}, "f: maximum 1.5"),
        (10**400, {"multipleOf": 0.1}, "f: the schema asks for too much"),
        ("a", {"$defs": {"a": {"type": "integer"}}, "$ref": "#/$defs/a"}, "f: not a JSON value of type integer"),
        (1, {"$defs": {"a": {"anyOf": [{"$ref": "#/$defs/a"}]}}, "$ref": "#/$defs/a"}, "f: the schema asks for too much"),
        ("a" * 40, {"pattern": "(a+)+b"}, ""),
        ({"a" * 40: 1}, {"patternProperties": {"(a+)+b": False}, "additionalProperties": False}, ""),
    ],
)  # fmt: skip
def test_first_mistake_of_a_value_has_a_place(value: Any, schema: Any, problem: str) -> None:
    assert not schema_problem(schema, "p")
    found = value_problem(value, schema, "f")
    assert found == "" if not problem else found.startswith(problem)


def test_schema_that_doubles_at_each_reference_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_schema, "SECONDS", 0.2)
    steps = {f"a{step}": {"anyOf": [{"$ref": f"#/$defs/a{step + 1}"}] * 2} for step in range(40)}
    schema = {"$defs": {**steps, "a40": {"type": "string"}}, "$ref": "#/$defs/a0"}
    assert value_problem("a", schema) == ""
    assert "asks for too much" in value_problem(1, schema)


def test_words_that_nothing_checks_are_named() -> None:
    inner = {"pattern": "a", "foo": 1, "format": "date", "description": "d", "enum": [{"baz": 1}]}
    assert unchecked_words({"properties": {"x": inner}, "anyOf": [True, {"bar": 1}]}) == {"pattern", "foo", "bar"}


def test_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    json_schema._validator.cache_clear()
    monkeypatch.setitem(sys.modules, "jsonschema", None)
    with pytest.raises(MissingPackage, match=r"'jsonschema' is needed for tools") as caught:
        schema_problem({}, "p")
    assert caught.value.remedy == "pip install 'tongwen[serve]'"
