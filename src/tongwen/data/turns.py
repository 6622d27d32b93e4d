"""Read a list of turns: role, text, thinking and calls of each, and whether it is learned.

The same words have many names: OpenAI's role and content, ShareGPT's from and value, LLaMA-Factory's lists of parts.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from typing import Any

from tongwen.core.errors import RowRejected
from tongwen.core.i18n import _
from tongwen.core.records import Message
from tongwen.data.fields import Fields, is_empty
from tongwen.data.row import kind
from tongwen.data.texts import as_yaml, double_encoded, is_blank, keys_of, parse_inside
from tongwen.data.tool_calls import calls_of, optional_string, read_call, read_tools
from tongwen.recipe.data import SourceConfig

EVERYONE = "*"  # among `roles`: any other name
ROLES = {
    "human": "user",
    "user": "user",
    "prompter": "user",
    "customer": "user",
    "client": "user",
    "visitor": "user",
    "用户": "user",
    "客户": "user",
    "顾客": "user",
    "访客": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "bot": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "ai": "assistant",
    "agent": "assistant",
    "助手": "assistant",
    "客服": "assistant",
    "坐席": "assistant",
    "system": "system",
    "developer": "system",
    "系统": "system",
    "tool": "tool",
    "observation": "tool",
    "function": "tool",
    "function_response": "tool",
    "tool_response": "tool",
    "ipython": "tool",
    "function_call": "function_call",
    "tool_call": "function_call",
}

LEARN = ("learn", "train", "loss", "weight", "loss_weight")
THOUGHTS = ("reasoning_content", "reasoning", "thinking", "thinking_content", "thought", "cot", "complex_cot")
_CONTENT_PARTS = {
    "text": "text",
    "input_text": "text",
    "output_text": "text",
    "thinking": "thinking",
    "reasoning": "thinking",
    "tool_call": "tool_call",
    "tool_use": "tool_use",
    "tool_result": "tool_result",
}
DETAILS = "reasoning_details"  # OpenRouter's list of {type: reasoning.text, text}
IN_TURNS = ("from", "value", "role", "content", "name", "tool_calls", "tool_call_id", *THOUGHTS, DETAILS, *LEARN)
_MEDIA = re.compile(r"((?:image|img|video|audio)s?)(?:_(?:url|path|file|byte|list|name)s?)?", re.IGNORECASE)
_MEDIA_NAMES = {"image": "images", "img": "images", "video": "videos", "audio": "audios"}


def list_turns(row: Fields, key: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (number, turn). Raises RowRejected for a turn that is not an object."""
    turns = row.get(key)
    if isinstance(turns, str) and turns.lstrip().startswith("["):
        raise double_encoded(key)
    if not isinstance(turns, list) or not turns:
        found = _("empty") if turns == [] else kind(turns)
        raise RowRejected(
            "no_messages",
            _("{key} must be a non-empty list, this is {found}").format(key=key, found=found),
        )
    for number, turn in enumerate(turns, 1):
        if not isinstance(turn, dict):
            raise RowRejected(
                "bad_turn",
                _("turn {number} is {kind}, not an object").format(number=number, kind=kind(turn)),
            )
        yield number, turn


@lru_cache(maxsize=4096)
def _plain_names(keys: tuple[str, ...]) -> tuple[str, str, str] | None:
    """Return the keys of speaker, text and thinking ("" without one) of a turn without other keys: of nearly every turn."""
    if len(keys) not in (2, 3) or keys[:2] not in (("role", "content"), ("from", "value")):
        return None
    thinking = keys[2] if len(keys) == 3 else ""
    return (keys[0], keys[1], thinking) if not thinking or thinking in THOUGHTS else None


def open_turn(row: Fields, turn: dict[str, Any], key: str) -> Fields:
    """Return the fields of a turn. Raises RowRejected for one with media."""
    fields = row.inside(turn, key, with_columns=True)
    check_media(fields)
    return fields


def read_turns(row: Fields, key: str, source: SourceConfig) -> tuple[list[Message], list[Any]]:
    """Return the messages of a list of turns of one role each, and the tools of its system turn. Calls in turns of their own
    that follow each other are one answer with several calls."""
    messages: list[Message] = []
    tools: list[Any] = []
    was_call = False
    turns = row.values.get(row.key(key) or "")
    plain = not source.columns and not source.ignore
    for number, values in list_turns(row, key):
        if (names := _plain_names(tuple(values))) and plain:
            said, thought = values[names[1]], values[names[2]] if names[2] else None
            role = _role(values[names[0]], number, source, turns)
            if (
                said.__class__ is str
                and role != "function_call"
                and (
                    thought in (None, "")
                    or (thought.__class__ is str and role == "assistant" and not is_blank(thought))
                )
            ):
                messages.append(Message(role, said, thought or None))
                was_call = False
                continue
        turn = open_turn(row, values, key)
        *results, message, is_call = _turn(turn, number, source, turns)
        messages += results
        if message is None:
            was_call = False
            continue
        if message.role == "system" and number == 1:
            tools = read_tools(turn)
        if is_call and was_call and not message.thinking and message.learn == messages[-1].learn:
            before = messages.pop()
            message = replace(before, tool_calls=(*before.tool_calls, *message.tool_calls))
        messages.append(message)
        was_call = is_call
    return messages, tools


def _turn(turn: Fields, number: int, source: SourceConfig, turns: Any) -> tuple[Any, ...]:
    """Return (results of tools in the turn …, its message or None, whether the turn consists of calls only)."""
    role = _role(turn.get("role", "from"), number, source, turns)
    is_call = role == "function_call"
    role = "assistant" if is_call else role
    answers = role == "assistant"
    thinking = _thinking(turn, number) if answers else None
    calls = calls_of(turn, number) if answers else []
    text, more_thinking, more_calls, results = _content(turn, number, optional=bool(calls), role=role)
    if is_call and not calls:
        found = parse_inside(text, _("turn {number}").format(number=number))
        calls, text = found if isinstance(found, list) else [found], ""
    if thinking and more_thinking and thinking != more_thinking:
        raise RowRejected("ambiguous", _("turn {number} has two different thinking texts").format(number=number))
    made = tuple(read_call(call, turn, number) for call in (*calls, *more_calls))
    message = Message(
        role,
        text,
        thinking or more_thinking or None,
        made,
        read_learn(turn, number, role),
        optional_string(turn, "name", number),
        optional_string(turn, "tool_call_id", number) if role == "tool" else None,
    )
    if results and is_blank(text):
        return *results, None, is_call
    return *results, message, is_call


def _thinking(turn: Fields, number: int) -> str | None:
    value = turn.get(*THOUGHTS)
    if isinstance(value, list) and value:
        value = _joined_parts(value)
    details = turn.get(DETAILS)
    if isinstance(details, list) and not isinstance(details := _joined_parts(details), str):
        turn.leave(DETAILS)  # encrypted, or a summary
        details = None
    if isinstance(details, str) and not is_blank(details):
        if isinstance(value, str) and not is_blank(value) and value.strip() != details.strip():
            raise RowRejected("ambiguous", _("turn {number} has two different thinking texts").format(number=number))
        value = value or details
    if value is not None and not isinstance(value, str):
        raise RowRejected(
            "bad_thinking",
            _("turn {number}: reasoning_content is {kind}").format(number=number, kind=kind(value)),
        )
    return None if value is None or is_blank(value) else value


def _joined_parts(parts: list[Any]) -> Any:
    """Return the text of a list of parts {type, text}; the list itself when it holds anything else."""
    found = [part.get("text", part.get("value")) if isinstance(part, dict) else part for part in parts]
    texts = [text for text in found if isinstance(text, str)]
    return "".join(texts) if len(texts) == len(parts) else parts


def _content(turn: Fields, number: int, optional: bool, role: str) -> tuple[str, str, list[Any], list[Message]]:
    """Return (text, thinking, calls, results of tools) of a turn. A list of parts is joined: LLaMA-Factory v1, Anthropic,
    OpenAI."""
    content = turn.get("content", "value") if turn.has("content", "value") else turn.get("text")
    if content is None and optional:
        return "", "", [], []
    if isinstance(content, str):
        return content, "", [], []
    if not isinstance(content, list) or not content or not all(isinstance(part, dict) for part in content):
        raise _bad_content(number, "value" if turn.has("value") and not turn.has("content") else "content", content, turn.values)  # fmt: skip
    answers = role == "assistant"
    found: dict[str, list[Any]] = {"text": [], "thinking": [], "tool_call": [], "tool_result": []}
    for part in content:
        fields = turn.inside(part, "content")
        type_ = fields.get("type")
        meaning = _CONTENT_PARTS.get(type_) if isinstance(type_, str) else None
        value: Any
        if meaning == "tool_use":  # Anthropic's names
            value = {"id": fields.get("id"), "name": fields.get("name"), "arguments": fields.get("input")}
            meaning = "tool_call"
        elif meaning == "tool_result":
            value = fields.get("content", "text")
        else:
            value = fields.get("text", "value", "thinking", "reasoning") if meaning else None
        value = _joined_parts(value) if isinstance(value, list) else value
        if meaning == "tool_result" and role in ("user", "tool") and isinstance(value, str) and not found["text"]:
            value = Message("tool", value, tool_call_id=optional_string(fields, "tool_use_id", number))
        elif (
            meaning in (None, "tool_result")
            or not isinstance(value, (str, dict))
            or (meaning != "text" and not answers)
        ):
            raise RowRejected(
                "not_only_text",
                _("turn {number} has a part of type {type!r}; only text is supported").format(
                    number=number, type=type_
                ),
            )
        found[meaning or ""].append(value)
    calls = [parse_inside(call, _("turn {number}").format(number=number)) if isinstance(call, str) else call for call in found["tool_call"]]  # fmt: skip
    if not all(isinstance(text, str) for text in (*found["text"], *found["thinking"])):
        raise _bad_content(number, "content", content, turn.values)
    return "".join(found["text"]), "".join(found["thinking"]), calls, found["tool_result"]


def _bad_content(number: int, key: str, content: Any, turn: dict[str, Any]) -> RowRejected:
    if content is None and not turn.keys() & {"content", "value", "text"}:
        return RowRejected(
            "bad_content",
            _("turn {number} has no text; the turn has {keys}; name it: columns: {{content: YOUR_TEXT}}").format(
                number=number, keys=keys_of(turn)
            ),
        )
    return RowRejected(
        "bad_content",
        _("turn {number}: {key} is {kind}, not text; the turn has {keys}").format(
            number=number, key=key, kind=kind(content), keys=keys_of(turn)
        ),
    )


def read_learn(turn: Fields, number: int, role: str) -> bool | None:
    learn = turn.get(*LEARN)
    if learn not in (None, 0, 1):
        raise RowRejected(
            "bad_learn",
            _("turn {number}: {learn!r} does not say whether to learn it; write true or false").format(
                number=number, learn=learn
            ),
        )
    if learn and role != "assistant":
        turn.leave(*LEARN)  # only answers are learned one by one
        return None
    return None if learn is None else bool(learn)


def _role(value: Any, number: int, source: SourceConfig, turns: Any) -> str:
    role = None
    if isinstance(value, str):
        role = source.roles.get(value) or ROLES.get(value.lower()) or source.roles.get(EVERYONE)
    if role is None:
        raise RowRejected(
            "unknown_role",
            _("turn {number}: unknown role {value!r}; map it in the recipe: roles: {{{roles}}}").format(
                number=number, value=value, roles=_likely_roles(value, turns, source)
            ),
        )
    return role


def _likely_roles(value: Any, turns: Any, source: SourceConfig) -> str:
    """Return a mapping of the unknown roles of a dialogue: who speaks last is the assistant, since a dialogue ends with an
    answer."""
    speakers = [turn.get(source.columns.get("role", "role"), turn.get(source.columns.get("from", "from"))) for turn in turns or () if isinstance(turn, dict)]  # fmt: skip
    unknown = [name for name in dict.fromkeys(speakers) if isinstance(name, str) and name not in source.roles and name.lower() not in ROLES]  # fmt: skip
    if not unknown or len(unknown) > 2 or len(speakers) < 2:
        return f"{as_yaml(value) if isinstance(value, str) else value}: user"
    return ", ".join(f"{as_yaml(name)}: {'assistant' if name == speakers[-1] else 'user'}" for name in unknown)


@lru_cache(maxsize=4096)
def _media_keys(keys: tuple[str, ...]) -> tuple[tuple[str, str], ...]:
    """Return (key, reason to refuse its content) of those keys that hold media. Most rows of a file have the same keys."""
    found = [(key, _MEDIA.fullmatch(key)) for key in keys]
    return tuple((key, _MEDIA_NAMES[match[1].lower().removesuffix("s")]) for key, match in found if match)


def check_media(row: Fields) -> None:
    """Raise RowRejected for a row or turn that cannot be understood without a picture, a video or a sound."""
    for key, reason in _media_keys(row.shape):
        if not is_empty(row.values[key]) and not isinstance(row.values[key], (bool, int, float)):
            raise RowRejected(
                reason,
                _("{key} is not empty, and only text is learned (ignore: [{key}] if the text stands alone)").format(
                    key=row.place + key
                ),
            )
