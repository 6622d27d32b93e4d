"""A row is written in the spelling that a template reads; its content stays the same."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

from tongwen.core.message_layout import DEFAULT_LAYOUT, apply_layout, layouts

CALL = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": '{"城市": "北京", "n": 2}'}}
TOOL = {"type": "function", "function": {"name": "f", "description": "查"}}
TURNS: list[dict[str, Any]] = [
    {"role": "user", "content": "问"},
    {"role": "assistant", "content": "", "reasoning_content": "想", "tool_calls": [CALL]},
    {"role": "tool", "content": "果", "tool_call_id": "call_1"},
    {"role": "assistant", "content": "答"},
]


def test_spellings_start_with_the_usual_one_without_repeats() -> None:
    found = list(layouts(TURNS, [TOOL], DEFAULT_LAYOUT))
    assert found[0] == DEFAULT_LAYOUT
    assert len(set(found)) == len(found)
    assert list(layouts(TURNS[:1], [], DEFAULT_LAYOUT)) == [DEFAULT_LAYOUT], "a plain row has one"


def test_arguments_are_an_object_or_json_text() -> None:
    messages, tools = apply_layout(TURNS, [TOOL], DEFAULT_LAYOUT)
    assert messages[1]["tool_calls"][0]["function"]["arguments"] == {"城市": "北京", "n": 2}
    assert messages[1]["tool_calls"][0]["id"] == "call_1" and messages[2]["tool_call_id"] == "call_1"
    assert tools == [TOOL]
    text = apply_layout(TURNS, [TOOL], replace(DEFAULT_LAYOUT, arguments="text"))[0][1]["tool_calls"][0]["function"][
        "arguments"
    ]
    assert json.loads(text) == {"城市": "北京", "n": 2} and "北京" in text


def test_flat_call_is_wrapped_and_plain_text_is_kept() -> None:
    turns = [{"role": "assistant", "content": "", "tool_calls": [{"name": "f", "arguments": "北京"}]}]
    (call,) = apply_layout(turns, [], DEFAULT_LAYOUT)[0][0]["tool_calls"]
    assert call == {"type": "function", "function": {"name": "f", "arguments": "北京"}}


def test_placement_of_thinking_content_and_tools() -> None:
    def turn(index: int = 1, **options: str) -> dict[str, Any]:
        return apply_layout(TURNS, [TOOL], replace(DEFAULT_LAYOUT, **options))[0][index]

    assert turn(thinking="thinking")["thinking"] == "想" and "reasoning_content" not in turn(thinking="thinking")
    assert turn(thinking="part")["content"][0] == {"type": "thinking", "thinking": "想"}
    assert turn(thinking="inline")["content"] == "<think>\n想\n</think>\n\n"
    assert "content" not in turn(empty="absent") and turn(empty="null")["content"] is None
    assert turn(0, content="parts")["content"] == [{"type": "text", "text": "问"}]
    assert turn(0, tools="system") == {"role": "system", "content": "", "tools": [TOOL]}
    assert json.loads(turn(0, tools="system_text")["tools"]) == [TOOL]
    assert apply_layout(TURNS, [TOOL], replace(DEFAULT_LAYOUT, tools="system"))[1] is None
    assert apply_layout(TURNS, [TOOL], replace(DEFAULT_LAYOUT, definitions="bare"))[1] == [TOOL["function"]]


def test_required_call_ids_are_generated_and_answers_match() -> None:
    calls = [{"function": {"name": name, "arguments": {}}} for name in ("f", "g")]
    turns = [
        {"role": "assistant", "content": "", "tool_calls": calls},
        {"role": "tool", "content": "一"},
        {"role": "tool", "content": "二"},
    ]
    call, *answers = apply_layout(turns, [], replace(DEFAULT_LAYOUT, ids="made"))[0]
    made = [one["id"] for one in call["tool_calls"]]
    assert [answer["tool_call_id"] for answer in answers] == made and len(set(made)) == 2
    assert all(len(one) == 9 and one.isalnum() for one in made), "the form that Mistral's templates ask for"
    assert [answer["name"] for answer in answers] == ["f", "g"]
    call, *answers = apply_layout(turns, [], replace(DEFAULT_LAYOUT, ids="function"))[0]
    assert [answer["tool_call_id"] for answer in answers] == ["functions.f:0", "functions.g:1"]
