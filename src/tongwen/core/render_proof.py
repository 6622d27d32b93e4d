"""Prove that a chat template shows every part of a row: plant a sentinel in each part and look for it in the render.

What is proven holds for the shape of a row: its roles, which parts they have, the keys of its calls and its tools. A row's own
values are looked for as well, since a template may treat some values otherwise than a sentinel.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from tongwen.core.i18n import _
from tongwen.core.message_layout import Offered, Tools, Turn, body_of, read_arguments

# Keys of a JSON schema whose values are words of the schema, not of the user.
SCHEMA_WORDS = ("type", "format", "$schema", "$ref", "strict", "additionalProperties", "required")


@dataclass(frozen=True)
class Part:
    """A part of a row and the sentinel that stands for it. turn: its index, or -1 for the tools; kind: content, thinking, call
    or tool; label: what a user calls it."""

    turn: int
    kind: str
    label: str
    sentinel: str

    @property
    def place(self) -> str:
        """Return where the part stands, for messages."""
        if self.turn < 0:
            return self.label
        return _("turn {turn}: {part}").format(turn=self.turn + 1, part=self.label)


@dataclass
class MarkedRow:
    """A row with sentinels in place of its parts."""

    turns: list[Turn] = field(default_factory=list)
    tools: list[dict[str, Any]] = field(default_factory=list)
    parts: list[Part] = field(default_factory=list)

    def of(self, turn: int) -> list[Part]:
        return [part for part in self.parts if part.turn == turn]


class _SentinelWriter:
    def __init__(self) -> None:
        self.out = MarkedRow()
        self.words: dict[str, str] = {}  # a name: the same sentinel wherever the name stands

    def mark(self) -> str:
        return f"zx{len(self.out.parts):04}xz"

    def text(self, turn: int, kind: str, label: str) -> str:
        sentinel = self.mark()
        self.out.parts.append(Part(turn, kind, label, sentinel))
        return sentinel

    def name(self, turn: int, kind: str, label: str, word: str) -> str:
        sentinel = self.words.setdefault(word, f"zn{len(self.words):04}nz")
        self.out.parts.append(Part(turn, kind, label, sentinel))
        return sentinel

    def value(self, turn: int, label: str, value: Any) -> Any:
        """Return an argument with sentinels in place of its keys, texts and numbers."""
        if isinstance(value, dict):
            return {
                self.name(turn, "call", _("the argument {key!r}").format(key=key), key): self.value(
                    turn, _("the argument {key!r}").format(key=key), inner
                )
                for key, inner in value.items()
            }
        if isinstance(value, list):
            return [self.value(turn, label, inner) for inner in value]
        if isinstance(value, str):
            return self.text(turn, "call", label)
        if isinstance(value, bool) or value is None:
            return value
        number = 97_000_001 + len(self.out.parts)
        self.out.parts.append(Part(turn, "call", label, str(number)))
        return type(value)(number)

    def schema(self, value: Any, label: str) -> Any:
        """Return a JSON schema with sentinels in place of descriptions and of the names of properties."""
        if isinstance(value, list):
            return [self.schema(inner, label) for inner in value]
        if not isinstance(value, dict):
            return value
        out: dict[str, Any] = {}
        for key, inner in value.items():
            if key == "properties" and isinstance(inner, dict):
                out[key] = {
                    self.name(-1, "tool", _("{tool}: its parameter {key!r}").format(tool=label, key=name), name): (
                        self.schema(one, label)
                    )
                    for name, one in inner.items()
                }
            elif key == "required" and isinstance(inner, list):
                out[key] = [self.words.get(name, name) if isinstance(name, str) else name for name in inner]
            elif key == "description" and isinstance(inner, str) and inner.strip():
                out[key] = self.text(-1, "tool", _("{tool}: a description").format(tool=label))
            else:
                out[key] = inner if key in SCHEMA_WORDS else self.schema(inner, label)
        return out

    def tool(self, tool: dict[str, Any]) -> dict[str, Any]:
        inner = body_of(tool)
        label = _("the tool {name!r}").format(name=inner.get("name", ""))
        named = isinstance(inner.get("name"), str)
        name = self.name(-1, "tool", label, inner["name"]) if named else None
        out = self.schema(inner, label)
        if named:
            out["name"] = name
        return {**tool, "function": out} if inner is not tool else out

    def call(self, turn: int, call: dict[str, Any]) -> dict[str, Any]:
        inner = body_of(call)
        name = str(inner.get("name", ""))
        label = _("the call of {name!r}").format(name=name)
        out = {**inner, "name": self.name(turn, "call", label, name)}
        arguments = read_arguments(inner.get("arguments"))
        if arguments is not None:
            out["arguments"] = self.value(turn, label, arguments)
        return {**call, "function": out} if inner is not call else out


def insert_sentinels(turns: Sequence[Turn], tools: Tools) -> MarkedRow:
    """Return the row with sentinels. Ids stay: templates ask for their form."""
    planter = _SentinelWriter()
    planter.out.tools = [planter.tool(tool) for tool in tools]
    for index, turn in enumerate(turns):
        marked = dict(turn)
        if turn.get("reasoning_content"):
            marked["reasoning_content"] = planter.text(index, "thinking", _("the thinking"))
        if turn["content"]:
            marked["content"] = planter.text(index, "content", _("the content"))
        if turn.get("tool_calls"):
            marked["tool_calls"] = [planter.call(index, call) for call in turn["tool_calls"]]
        if turn["role"] == "tool" and isinstance(turn.get("name"), str):
            marked["name"] = planter.words.get(turn["name"], turn["name"])
        planter.out.turns.append(marked)
    return planter.out


def find_missing_part(marked: MarkedRow, prompt: str, answer: str) -> Part | None:
    """Return the first part that the render of (prompt, answer of the last turn) lacks, or has at another place.

    The answer shows the parts of the last turn, its texts once each, its arguments as JSON writes them; the prompt shows
    the rest in the order of the turns. Thinking of earlier turns may be cut, as it is at inference. A call with keywords,
    `f(city='…')`, is written in Python's notation throughout (LFM2).
    """
    last = len(marked.turns) - 1
    keywords = any(part.kind == "call" and f"{part.sentinel}=" in answer for part in marked.of(last))
    at = 0
    for part in marked.parts:
        text = answer if part.turn == last else prompt
        if part.turn != last and part.kind == "thinking":
            continue
        found = text.find(part.sentinel, at if part.turn != last and part.kind == "content" else 0)
        if found < 0 or (part.turn == last and not keywords and _is_misspelt(part, text)):
            return part
        if part.turn == last and part.kind != "call" and text.count(part.sentinel) > 1:
            return part
        if part.turn != last and part.kind == "content":
            at = found
    return None


def _is_misspelt(part: Part, text: str) -> bool:
    """Whether a call is written in Python's notation or in JSON inside JSON, or a text as the value of a key: never what a model
    should write."""
    if part.kind == "call":
        return f"'{part.sentinel}'" in text or f'\\"{part.sentinel}' in text
    return f": '{part.sentinel}'" in text or f'": "{part.sentinel}"' in text


def values_of(turn: Turn) -> Iterator[tuple[str, str]]:
    """Yield (kind, text) of what the row itself writes in a turn: its thinking, its content, the values of its calls."""
    if turn.get("reasoning_content"):
        yield "thinking", turn["reasoning_content"]
    yield "content", turn["content"]
    for call in turn.get("tool_calls") or ():
        inner = body_of(call)
        yield "call", str(inner.get("name", ""))
        for value in _leaves(read_arguments(inner.get("arguments"))):
            yield "call", value


def _leaves(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for inner in value.values():
            yield from _leaves(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _leaves(inner)
    elif isinstance(value, str):
        yield value
    elif isinstance(value, int) and not isinstance(value, bool):
        yield str(value)


def contains_value(text: str, kind: str, value: str) -> bool:
    """Whether a text contains a value of a row: trimmed, or as JSON writes it in the arguments of a call."""
    stripped = value.strip()
    if not stripped or stripped in text:
        return True
    if kind != "call":
        return False
    quoted = json.dumps(value, ensure_ascii=False)[1:-1]
    forms = quoted, json.dumps(value)[1:-1], quoted.replace('\\"', '"').replace("'", "\\'")
    return any(form in text for form in forms)


def shape_of(turns: Sequence[Turn], tools: Tools) -> tuple[Any, ...]:
    """Return what two rows have in common when one proof holds for both."""
    return (
        Offered.of(tools).json,
        *[_turn_shape(turn) for turn in turns],
    )


def _turn_shape(turn: Turn) -> tuple[Any, ...]:
    calls = turn.get("tool_calls")
    if not calls and len(turn) == 2:
        return turn["role"], bool(turn["content"])
    return (
        turn["role"],
        bool(turn["content"]),
        bool(turn.get("reasoning_content")),
        turn.get("name") is not None,
        turn.get("tool_call_id") is not None,
        tuple(_call_shape(call) for call in calls or ()),
    )


def _call_shape(call: dict[str, Any]) -> tuple[Any, ...]:
    inner = body_of(call)
    return call.get("id") is not None, inner is call, _structure(read_arguments(inner.get("arguments")))


def _structure(value: Any) -> Any:
    if isinstance(value, dict):
        return tuple((key, _structure(inner)) for key, inner in value.items())
    if isinstance(value, list):
        return tuple(_structure(inner) for inner in value)
    return type(value).__name__
