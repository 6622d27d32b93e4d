"""The render proof names each part of a row that a chat template does not render."""

from __future__ import annotations

import json
from typing import Any

from tongwen.core.render_proof import find_missing_part, insert_sentinels, shape_of

TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "查天气",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "description": "城市名"}},
            "required": ["city"],
        },
    },
}
TURNS: list[dict[str, Any]] = [
    {"role": "system", "content": "系统"},
    {"role": "user", "content": "问"},
    {
        "role": "assistant",
        "content": "",
        "reasoning_content": "想",
        "tool_calls": [{"function": {"name": "get_weather", "arguments": {"city": "北京", "days": 3, "now": True}}}],
    },
    {"role": "tool", "content": "晴", "name": "get_weather"},
    {"role": "assistant", "content": "答"},
]


def test_each_part_is_replaced_by_a_sentinel() -> None:
    marked = insert_sentinels(TURNS, [TOOL])
    text = json.dumps([marked.turns, marked.tools], ensure_ascii=False)
    for value in ("系统", "问", "想", "get_weather", "北京", "city", "晴", "答", "查天气", "城市名"):
        assert value not in text, value
    for part in marked.parts:
        assert part.sentinel in text, part
    assert marked.tools[0]["function"]["name"] == marked.turns[2]["tool_calls"][0]["function"]["name"]
    assert marked.tools[0]["function"]["parameters"]["type"] == "object", "words of the schema stay"


def render(marked: Any, *leave: str) -> str:
    return " ".join(part.sentinel for part in marked.parts if part.turn < 4 and part.sentinel not in leave)


def test_missing_part_is_named() -> None:
    marked = insert_sentinels(TURNS, [TOOL])
    answer = marked.turns[4]["content"]
    assert find_missing_part(marked, render(marked), answer) is None
    for part in marked.parts:
        if part.turn < 4 and part.kind != "thinking":
            lost = find_missing_part(marked, render(marked, part.sentinel), answer)
            assert lost is not None and lost.sentinel == part.sentinel
    lost = find_missing_part(marked, render(marked), "")
    assert lost is not None and lost.place == "turn 5: the content"


def test_reordered_turns_and_repeated_answers_are_detected() -> None:
    marked = insert_sentinels(TURNS[:2] + TURNS[4:], [])
    system, ask, reply = (turn["content"] for turn in marked.turns)
    assert find_missing_part(marked, system + ask, reply) is None
    assert find_missing_part(marked, ask + system, reply) is not None
    assert find_missing_part(marked, system + ask, reply + reply) is not None


def test_python_repr_is_no_tool_call() -> None:
    marked = insert_sentinels(TURNS[1:3], [])
    prompt, thought = marked.turns[0]["content"], marked.turns[1]["reasoning_content"]
    call = marked.turns[1]["tool_calls"][0]["function"]
    assert find_missing_part(marked, prompt, thought + json.dumps(call)) is None
    assert find_missing_part(marked, prompt, thought + str(call)) is not None
    assert find_missing_part(marked, prompt, thought + json.dumps(json.dumps(call))) is not None


def test_equal_structures_share_one_shape() -> None:
    def call(**arguments: Any) -> list[dict[str, Any]]:
        return [
            {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": arguments}}]}
        ]

    assert shape_of(call(city="北京"), []) == shape_of(call(city="上海"), [])
    assert shape_of(call(city="北京"), []) != shape_of(call(city=1), [])
    assert shape_of(call(city="北京"), []) != shape_of(call(town="北京"), [])
    assert shape_of(TURNS, []) != shape_of(TURNS, [TOOL])
