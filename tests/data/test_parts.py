"""Parts of a content in the forms of Anthropic, OpenAI and OpenRouter are calls, results and thinking, or refused."""

from __future__ import annotations

from typing import Any

import pytest

from tests.data.rows import as_dialogue
from tongwen.core.errors import RowRejected

ASK = {"role": "user", "content": "北京的天气？"}
USE = {"type": "tool_use", "id": "t1", "name": "get_weather", "input": {"city": "北京"}}
OTHER = {"type": "tool_use", "id": "t2", "name": "get_time", "input": {}}
RESULT = {"type": "tool_result", "tool_use_id": "t1", "content": "晴"}
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}}
TOOL = {"name": "get_weather", "description": "查天气", "input_schema": SCHEMA}
END = {"role": "assistant", "content": [{"type": "text", "text": "今天晴。"}]}


def test_dialogue_of_anthropic() -> None:
    parts = [
        {"type": "thinking", "thinking": "要查", "signature": "x="},
        {"type": "text", "text": "我查一下。"},
        USE,
        OTHER,
    ]
    results = [RESULT, {"type": "tool_result", "tool_use_id": "t2", "content": [{"type": "text", "text": "八点"}], "is_error": True}]  # fmt: skip
    turns = [ASK, {"role": "assistant", "content": parts}, {"role": "user", "content": results}, END]
    found = as_dialogue({"system": "你是助手", "messages": turns, "tools": [TOOL]})
    assert [message.role for message in found.messages] == ["system", "user", "assistant", "tool", "tool", "assistant"]
    call = found.messages[2]
    assert (call.content, call.thinking) == ("我查一下。", "要查")
    assert [one["id"] for one in call.tool_calls] == ["t1", "t2"]
    assert call.tool_calls[0]["function"] == {"name": "get_weather", "arguments": {"city": "北京"}}
    assert [(one.content, one.tool_call_id) for one in found.messages[3:5]] == [("晴", "t1"), ("八点", "t2")]
    assert found.tools == ({"type": "function", "function": {"name": "get_weather", "description": "查天气", "parameters": SCHEMA}},)  # fmt: skip
    assert found.unread == ("messages.content.signature", "messages.content.is_error")


def test_question_may_follow_the_results() -> None:
    turns = [ASK, {"role": "assistant", "content": [USE]}, {"role": "user", "content": [RESULT, {"type": "text", "text": "明天呢？"}]}, END]  # fmt: skip
    found = as_dialogue({"messages": turns})
    assert [(one.role, one.content) for one in found.messages[2:4]] == [("tool", "晴"), ("user", "明天呢？")]


@pytest.mark.parametrize(
    "part",
    [
        {"type": "tool_result", "tool_use_id": "t1", "content": [{"type": "image", "source": {}}]},
        {"type": "redacted_thinking", "data": "x"},
        USE,
    ],
)
def test_other_parts_of_a_question_cost_their_row(part: dict[str, Any]) -> None:
    turns = [ASK, {"role": "assistant", "content": [USE]}, {"role": "user", "content": [part]}, END]
    with pytest.raises(RowRejected) as caught:
        as_dialogue({"messages": turns})
    assert caught.value.reason == "not_only_text"


def thinking_of(**words: Any) -> Any:
    found = as_dialogue({"messages": [ASK, {"role": "assistant", "content": "晴", **words}]})
    return found.messages[-1].thinking, found.unread


def test_reasoning_details_are_thinking() -> None:
    details = [{"type": "reasoning.text", "text": "先", "index": 0}, {"type": "reasoning.text", "text": "想"}]
    assert thinking_of(reasoning_details=details)[0] == "先想"
    assert thinking_of(reasoning="先想", reasoning_details=details)[0] == "先想"
    sealed = [{"type": "reasoning.encrypted", "data": "x"}]
    assert thinking_of(reasoning="想", reasoning_details=sealed) == ("想", ("messages.reasoning_details",))
    with pytest.raises(RowRejected):
        thinking_of(reasoning="另一个", reasoning_details=details)
