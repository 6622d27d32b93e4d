"""A row is written in the spelling that a template reads; its content stays the same."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

from tongwen.core.row_spelling import USUAL, spell, spellings

CALL = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": '{"城市": "北京", "n": 2}'}}
TOOL = {"type": "function", "function": {"name": "f", "description": "查"}}
TURNS: list[dict[str, Any]] = [
    {"role": "user", "content": "问"},
    {"role": "assistant", "content": "", "reasoning_content": "想", "tool_calls": [CALL]},
    {"role": "tool", "content": "果", "tool_call_id": "call_1"},
    {"role": "assistant", "content": "答"},
]


def test_the_usual_spelling_comes_first_and_each_once() -> None:
    found = list(spellings(TURNS, [TOOL], USUAL))
    assert found[0] == USUAL
    assert len(set(found)) == len(found)
    assert list(spellings(TURNS[:1], [], USUAL)) == [USUAL], "a plain row has one"


def test_arguments_are_an_object_or_its_text() -> None:
    messages, tools = spell(TURNS, [TOOL], USUAL)
    assert messages[1]["tool_calls"][0]["function"]["arguments"] == {"城市": "北京", "n": 2}
    assert messages[1]["tool_calls"][0]["id"] == "call_1" and messages[2]["tool_call_id"] == "call_1"
    assert tools == [TOOL]
    text = spell(TURNS, [TOOL], replace(USUAL, arguments="text"))[0][1]["tool_calls"][0]["function"]["arguments"]
    assert json.loads(text) == {"城市": "北京", "n": 2} and "北京" in text


def test_a_flat_call_is_wrapped_and_a_text_that_is_no_object_stays() -> None:
    turns = [{"role": "assistant", "content": "", "tool_calls": [{"name": "f", "arguments": "北京"}]}]
    (call,) = spell(turns, [], USUAL)[0][0]["tool_calls"]
    assert call == {"type": "function", "function": {"name": "f", "arguments": "北京"}}


def test_where_thinking_content_and_tools_stand() -> None:
    def turn(index: int = 1, **words: str) -> dict[str, Any]:
        return spell(TURNS, [TOOL], replace(USUAL, **words))[0][index]

    assert turn(thinking="thinking")["thinking"] == "想" and "reasoning_content" not in turn(thinking="thinking")
    assert turn(thinking="part")["content"][0] == {"type": "thinking", "thinking": "想"}
    assert turn(thinking="inline")["content"] == "<think>\n想\n</think>\n\n"
    assert "content" not in turn(empty="absent") and turn(empty="null")["content"] is None
    assert turn(0, content="parts")["content"] == [{"type": "text", "text": "问"}]
    assert turn(0, tools="system") == {"role": "system", "content": "", "tools": [TOOL]}
    assert json.loads(turn(0, tools="system_text")["tools"]) == [TOOL]
    assert spell(TURNS, [TOOL], replace(USUAL, tools="system"))[1] is None
    assert spell(TURNS, [TOOL], replace(USUAL, definitions="bare"))[1] == [TOOL["function"]]


def test_ids_that_a_template_asks_for_are_made_and_answers_follow_them() -> None:
    calls = [{"function": {"name": name, "arguments": {}}} for name in ("f", "g")]
    turns = [
        {"role": "assistant", "content": "", "tool_calls": calls},
        {"role": "tool", "content": "一"},
        {"role": "tool", "content": "二"},
    ]
    call, *answers = spell(turns, [], replace(USUAL, ids="made"))[0]
    made = [one["id"] for one in call["tool_calls"]]
    assert [answer["tool_call_id"] for answer in answers] == made and len(set(made)) == 2
    assert all(len(one) == 9 and one.isalnum() for one in made), "the form that Mistral's templates ask for"
    assert [answer["name"] for answer in answers] == ["f", "g"]
    call, *answers = spell(turns, [], replace(USUAL, ids="function"))[0]
    assert [answer["tool_call_id"] for answer in answers] == ["functions.f:0", "functions.g:1"]
