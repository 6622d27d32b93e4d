"""Raw rows become Documents and Dialogues. The format is recognised from the keys that a row has.

A row answers with a record, or is refused with a reason that stands in the ledger and in rejected.jsonl.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from itertools import pairwise
from typing import Any

from tongwen.errors import DataError, RowRefused
from tongwen.language import say
from tongwen.record import Dialogue, Document, Message, Origin

ROLES = {
    "human": "user",
    "user": "user",
    "prompter": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "bot": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "system": "system",
    "developer": "system",
    "tool": "tool",
    "observation": "tool",
    "function": "tool",
    "function_response": "tool",
    "function_call": "function_call",
}
THINKING = re.compile(r"\A\s*<think>(.*?)</think>\s*", re.DOTALL)
PLACEHOLDER = re.compile(r"\{\{(\w+)\}\}")
# Placeholders that identity data sets use; left unfilled they would be learned as the model's name.
MUST_FILL = {"name", "author"}


def recognise(row: Any) -> str | None:
    """alpaca, messages, conversations or text by the keys of the row; None when it is none of them."""
    if isinstance(row, str):
        return "text"
    if not isinstance(row, dict):
        return None
    if "messages" in row:
        return "messages"
    if "conversations" in row:
        return "conversations"
    if "instruction" in row and ("output" in row or "input" in row):
        return "alpaca"
    return "text" if "text" in row else None


def read_dialogue(
    row: Any, format_: str, columns: Mapping[str, str], fill: Mapping[str, str], origin: Origin
) -> Dialogue:
    """One dialogue from one row. Raises RowRefused."""
    if not isinstance(row, dict):
        raise RowRefused(
            "not_an_object", say(f"a row must be an object, this is {_kind(row)}", f"每行应为对象，此处是 {_kind(row)}")
        )
    named = dict(row)
    for ours, theirs in columns.items():
        if theirs in row:
            named[ours] = row[theirs]
    messages, tools = READERS[format_](named)
    messages = [_split_thinking(_filled(message, fill)) for message in messages]
    _check_dialogue(messages)
    return Dialogue(tuple(messages), origin, tuple(tools))


def read_document(row: Any, columns: Mapping[str, str], origin: Origin) -> Document:
    """One document from one row. Raises RowRefused."""
    text = row if isinstance(row, str) else row.get(columns.get("text", "text")) if isinstance(row, dict) else None
    if not isinstance(text, str):
        raise RowRefused(
            "no_text", say(f"no text in this row: it has {_keys(row)}", f"该行没有文本：现有 {_keys(row)}")
        )
    if not text.strip():
        raise RowRefused("empty_text", say("the text is empty", "文本为空"))
    return Document(_checked(text, "text"), origin)


def _read_alpaca(row: dict[str, Any]) -> tuple[list[Message], list[Any]]:
    question = _text(row, "instruction")
    extra = _text(row, "input", default="")
    answer = _text(row, "output")
    messages = []
    if system := _text(row, "system", default=""):
        messages.append(Message("system", system))
    for turn in row.get("history") or ():
        if not (isinstance(turn, (list, tuple)) and len(turn) == 2 and all(isinstance(part, str) for part in turn)):
            raise RowRefused(
                "bad_history", say("history must be a list of [question, answer]", "history 应为 [问, 答] 的列表")
            )
        messages += [Message("user", turn[0]), Message("assistant", turn[1])]
    messages.append(Message("user", f"{question}\n{extra}" if extra else question))
    messages.append(Message("assistant", answer))
    return messages, []


def _turns(row: dict[str, Any], key: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """(number, turn) of each turn, which is an object."""
    turns = row.get(key)
    if not isinstance(turns, list) or not turns:
        raise RowRefused(
            "no_messages",
            say(
                f"{key} must be a list with turns, this is {_kind(turns)}", f"{key} 应为非空列表，此处是 {_kind(turns)}"
            ),
        )
    for number, turn in enumerate(turns, 1):
        if not isinstance(turn, dict):
            raise RowRefused(
                "bad_turn",
                say(f"turn {number} is {_kind(turn)}, not an object", f"第 {number} 轮是 {_kind(turn)}，不是对象"),
            )
        yield number, turn


def _read_messages(row: dict[str, Any]) -> tuple[list[Message], list[Any]]:
    messages = []
    for number, turn in _turns(row, "messages"):
        role = _role(turn.get("role"), number)
        calls = turn.get("tool_calls") or ()
        if not isinstance(calls, (list, tuple)) or not all(isinstance(call, dict) for call in calls):
            raise RowRefused(
                "bad_tool_calls",
                say(f"turn {number}: tool_calls must be a list of objects", f"第 {number} 轮：tool_calls 应为对象列表"),
            )
        content = turn.get("content")
        if content is None and calls:
            content = ""
        if not isinstance(content, str):
            raise RowRefused(
                "bad_content",
                say(
                    f"turn {number}: content is {_kind(content)}, not text",
                    f"第 {number} 轮：content 是 {_kind(content)}，不是文本",
                ),
            )
        learn = next((turn[key] for key in ("learn", "train", "loss") if key in turn), None)
        if learn is not None and not isinstance(learn, (bool, int)):
            raise RowRefused(
                "bad_learn",
                say(f"turn {number}: learn must be true or false", f"第 {number} 轮：learn 应为 true 或 false"),
            )
        thinking = turn.get("reasoning_content", turn.get("thinking"))
        if thinking is not None and not isinstance(thinking, str):
            raise RowRefused(
                "bad_thinking",
                say(
                    f"turn {number}: reasoning_content is {_kind(thinking)}",
                    f"第 {number} 轮：reasoning_content 是 {_kind(thinking)}",
                ),
            )
        messages.append(
            Message(
                role,
                content,
                thinking or None,
                tuple(_tool_call(call, number) for call in calls),
                None if learn is None else bool(learn),
            )
        )
    tools = row.get("tools") or []
    if isinstance(tools, str):
        tools = _json(tools, "tools")
    if not isinstance(tools, list):
        raise RowRefused("bad_tools", say("tools must be a list", "tools 应为列表"))
    return messages, tools


def _read_conversations(row: dict[str, Any]) -> tuple[list[Message], list[Any]]:
    """ShareGPT and BELLE: from/value, with function_call and observation."""
    messages = []
    if system := _text(row, "system", default=""):
        messages.append(Message("system", system))
    for number, turn in _turns(row, "conversations"):
        role = _role(turn.get("from", turn.get("role")), number)
        content = turn.get("value", turn.get("content"))
        if not isinstance(content, str):
            raise RowRefused(
                "bad_content",
                say(
                    f"turn {number}: value is {_kind(content)}, not text; the turn has {_keys(turn)}",
                    f"第 {number} 轮：value 是 {_kind(content)}，不是文本；该轮有 {_keys(turn)}",
                ),
            )
        if role == "function_call":
            call = _json(content, f"turn {number}")
            calls = call if isinstance(call, list) else [call]
            messages.append(Message("assistant", "", tool_calls=tuple(_tool_call(item, number) for item in calls)))
        else:
            messages.append(Message(role, content))
    tools = row.get("tools") or []
    return messages, _json(tools, "tools") if isinstance(tools, str) else tools


READERS: dict[str, Callable[[dict[str, Any]], tuple[list[Message], list[Any]]]] = {
    "alpaca": _read_alpaca,
    "messages": _read_messages,
    "conversations": _read_conversations,
}


def _tool_call(call: Any, number: int) -> dict[str, Any]:
    """OpenAI's shape, with the arguments as an object: what chat templates read."""
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise RowRefused(
            "bad_tool_calls", say(f"turn {number}: a tool call needs a name", f"第 {number} 轮：工具调用需要 name")
        )
    arguments = function.get("arguments", function.get("parameters", {}))
    if isinstance(arguments, str):
        arguments = _json(arguments, f"turn {number}: arguments")
    return {"type": "function", "function": {"name": function["name"], "arguments": arguments}}


def _check_dialogue(messages: list[Message]) -> None:
    for message in messages:
        if message.role == "assistant" and not message.content.strip() and not message.tool_calls:
            raise RowRefused("empty_answer", say("an answer is empty", "回答为空"))
        if message.role == "user" and not message.content.strip():
            raise RowRefused("empty_question", say("a question is empty", "问题为空"))
        _checked(message.content, "content")
        if found := [name for name in PLACEHOLDER.findall(message.content) if name in MUST_FILL]:
            raise DataError(
                say(f"the placeholder {{{{{found[0]}}}}} is not filled in", f"占位符 {{{{{found[0]}}}}} 未填写"),
                remedy=f"prepare: {{fill: {{{found[0]}: …}}}}",
            )
    if not any(message.role == "assistant" for message in messages):
        raise RowRefused("no_answer", say("the dialogue has no answer to learn", "对话没有可学习的回答"))
    if not any(message.role in ("user", "tool") for message in messages):
        raise RowRefused("no_question", say("the dialogue has no question", "对话没有提问"))
    turns = [message.role for message in messages if message.role != "system"]
    if turns[0] == "assistant":
        raise RowRefused("answer_first", say("the dialogue begins with an answer", "对话以回答开头"))
    if any(first == second == "assistant" or first == second == "user" for first, second in pairwise(turns)):
        raise RowRefused("roles_repeat", say("the same role speaks twice in a row", "同一角色连续发言"))
    if any(message.role == "system" for message in messages[1:]):
        raise RowRefused(
            "late_system", say("a system message stands after the first turn", "system 消息出现在首轮之后")
        )


def _split_thinking(message: Message) -> Message:
    """`<think>…</think>` at the head of an answer is its thinking."""
    if message.role != "assistant" or message.thinking is not None or not (found := THINKING.match(message.content)):
        return message
    content = message.content[found.end() :]
    if not content.strip() and not message.tool_calls:
        raise RowRefused("only_thinking", say("the answer holds only thinking", "回答只有思考过程"))
    return Message(message.role, content, found[1].strip() or None, message.tool_calls, message.learn)


def _filled(message: Message, fill: Mapping[str, str]) -> Message:
    if not fill or "{{" not in message.content:
        return message
    content = PLACEHOLDER.sub(lambda found: fill.get(found[1], found[0]), message.content)
    return Message(message.role, content, message.thinking, message.tool_calls, message.learn)


def _text(row: dict[str, Any], key: str, default: str | None = None) -> str:
    value = row.get(key)
    if value is None and default is not None:
        return default
    if key not in row:
        raise RowRefused(
            "missing_key", say(f"no key {key!r}; the row has {_keys(row)}", f"没有键 {key!r}；该行有 {_keys(row)}")
        )
    if not isinstance(value, str):
        raise RowRefused("not_text", say(f"{key} is {_kind(value)}, not text", f"{key} 是 {_kind(value)}，不是文本"))
    if key == "output" and not value.strip():
        raise RowRefused(
            "empty_answer", say("output is empty: there is no answer to learn", "output 为空：没有可学习的回答")
        )
    return value


def _checked(text: str, key: str) -> str:
    if "\0" in text:
        raise RowRefused("nul_character", say(f"{key} contains a NUL character", f"{key} 含有 NUL 字符"))
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise RowRefused(
            "lone_surrogate", say(f"{key} contains half of a surrogate pair", f"{key} 含有不成对的代理字符")
        ) from None
    return text


def _role(value: Any, number: int) -> str:
    role = ROLES.get(str(value).lower()) if isinstance(value, str) else None
    if role is None:
        raise RowRefused(
            "unknown_role", say(f"turn {number}: unknown role {value!r}", f"第 {number} 轮：未知角色 {value!r}")
        )
    return role


def _json(text: Any, where: str) -> Any:
    try:
        return json.loads(text) if isinstance(text, str) else text
    except ValueError as error:
        raise RowRefused(
            "bad_json_inside", say(f"{where} is not JSON: {error}", f"{where} 不是 JSON：{error}")
        ) from None


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "text", int: "a number", float: "a number", bool: "true/false"}
    return "null" if value is None else names.get(type(value), type(value).__name__)


def _keys(row: Any) -> str:
    return ", ".join(map(str, row)) if isinstance(row, dict) else _kind(row)
