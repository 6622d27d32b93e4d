"""Read the tools of a row and the calls of a turn, in OpenAI's form, without what a table pads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from tongwen.core.errors import RowRejected
from tongwen.core.i18n import _
from tongwen.core.records import Message
from tongwen.data.fields import Fields
from tongwen.data.row import kind
from tongwen.data.texts import check_data, parse_inside


def calls_of(turn: Fields, number: int) -> list[Any]:
    calls = turn.get("tool_calls") or []
    if isinstance(calls, str):
        calls = parse_inside(calls, "tool_calls")
    if not isinstance(calls, (list, tuple)) or not all(isinstance(call, dict) for call in calls):
        raise RowRejected(
            "bad_tool_calls",
            _("turn {number}: tool_calls must be a list of objects").format(number=number),
        )
    call = turn.get("function_call")
    return [*calls, *([call] if call else [])]


def read_tools(row: Fields) -> list[Any]:
    tools = row.get("tools", "functions") or []
    if isinstance(tools, str):
        tools = parse_inside(tools, "tools") if tools.strip() else []
    if isinstance(tools, list):
        tools = [
            parse_inside(tool, "tools") if isinstance(tool, str) and tool.startswith("{") else tool for tool in tools
        ]
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise RowRejected("bad_tools", _("tools must be a list of objects"))
    return [_usual(tool) if "input_schema" in tool else tool for tool in tools]


def _usual(tool: dict[str, Any]) -> dict[str, Any]:
    """Return a tool in OpenAI's form from Anthropic's, whose parameters are its `input_schema`."""
    inner = {"parameters" if key == "input_schema" else key: value for key, value in tool.items() if key != "type"}
    return {"type": "function", "function": inner}


def read_call(call: Any, turn: Fields, number: int) -> dict[str, Any]:
    """Return a tool call in OpenAI's format, with the arguments as an object, as chat templates expect."""
    fields = turn.inside(call, "tool_calls") if isinstance(call, dict) else None
    function = fields.get("function") if fields else None
    inner = fields.inside(function, "function") if fields and isinstance(function, dict) else fields
    name = inner.get("name") if inner else None
    if fields is None or inner is None or not isinstance(name, str):
        raise RowRejected("bad_tool_calls", _("turn {number}: a tool call needs a name").format(number=number))
    fields.get("type")
    arguments = inner.get("arguments", "parameters")
    if isinstance(arguments, str):
        arguments = parse_inside(arguments, _("turn {number}: arguments").format(number=number)) if arguments else {}
    if arguments is None:
        arguments = {}
    if not isinstance(arguments, dict):
        raise RowRejected(
            "bad_tool_calls",
            _("turn {number}: the arguments of a tool call are {kind}, not an object").format(
                number=number, kind=kind(arguments)
            ),
        )
    id_ = optional_string(fields, "id", number)
    made = {"type": "function", "function": {"name": name, "arguments": arguments}}
    check_data(made, _("turn {number}: tool_calls").format(number=number))
    return {"id": id_, **made} if id_ else made


def without_padding(tools: list[Any], messages: list[Message]) -> list[Any]:
    """Remove the nulls with which a table makes objects alike: properties without a schema, and arguments that the schema of
    their tool does not have. A null that stands under a declared name stays. Changes the calls of the messages, too."""
    arguments = [call["function"]["arguments"] for message in messages for call in message.tool_calls]
    if not any(None in one.values() for one in arguments) and not _has_null(tools):
        return tools
    declared: dict[str, set[str]] = {}
    cleaned = []
    for tool in tools:
        tool = _without_null_properties(tool)
        function = tool.get("function", tool)
        parameters = function.get("parameters") if isinstance(function, dict) else None
        properties = parameters.get("properties") if isinstance(parameters, dict) else None
        if isinstance(properties, dict) and isinstance(function.get("name"), str):
            declared[function["name"]] = set(properties)
        cleaned.append(tool)
    for index, message in enumerate(messages):
        calls = [_without_undeclared_nulls(call, declared) for call in message.tool_calls]
        if calls != list(message.tool_calls):
            messages[index] = replace(message, tool_calls=tuple(calls))
    return cleaned


def _has_null(value: Any) -> bool:
    if isinstance(value, (dict, list)):
        return any(map(_has_null, value.values() if isinstance(value, dict) else value))
    return value is None


def _without_null_properties(schema: Any) -> Any:
    """Return a schema without properties that are null: none is a schema."""
    if isinstance(schema, list):
        return [_without_null_properties(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    return {
        key: {name: _without_null_properties(part) for name, part in value.items() if part is not None}
        if key == "properties" and isinstance(value, dict)
        else _without_null_properties(value)
        for key, value in schema.items()
    }


def _without_undeclared_nulls(call: dict[str, Any], declared: Mapping[str, set[str]]) -> dict[str, Any]:
    function = call["function"]
    names = declared.get(function["name"])
    if names is None:
        return call
    arguments = {key: value for key, value in function["arguments"].items() if value is not None or key in names}
    return {**call, "function": {**function, "arguments": arguments}}


def optional_string(turn: Fields, key: str, number: int) -> str | None:
    """Return a name or an id; None when there is none."""
    value = turn.get(key)
    if value is None or isinstance(value, str):
        return value or None
    raise RowRejected(
        "bad_name",
        _("turn {number}: {key} is {kind}, not text").format(number=number, key=key, kind=kind(value)),
    )
