"""Records that all stages share: Document, Dialogue with its Messages, and the Spans of a rendered text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple


@dataclass(frozen=True, slots=True)
class Origin:
    """The source of a record: the file as the user wrote it, and the row in that file, counted from 1."""

    file: str
    row: int

    def __str__(self) -> str:
        return f"{self.file}:{self.row}"


@dataclass(frozen=True, slots=True)
class Document:
    """Plain text for language modelling."""

    text: str
    origin: Origin
    meta: dict[str, Any] = field(default_factory=dict)
    unread: tuple[str, ...] = field(default=(), compare=False)  # fields of its row that nothing reads; not written

    def to_dict(self) -> dict[str, Any]:
        return {"text": self.text, "origin": {"file": self.origin.file, "row": self.origin.row}}


@dataclass(frozen=True, slots=True)
class Message:
    """One turn. `role` is system, user, assistant or tool; `thinking` is the model's reasoning before the answer;
    `learn` overrides the recipe's choice for this turn; `name` is who speaks, or the tool that answers the call with the
    id `tool_call_id`."""

    role: str
    content: str
    thinking: str | None = None
    tool_calls: tuple[dict[str, Any], ...] = ()
    learn: bool | None = None
    name: str | None = None
    tool_call_id: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the OpenAI-style dictionary: the format on disk and of chat templates."""
        out: dict[str, Any] = {"role": self.role, "content": self.content}
        if self.thinking is not None:
            out["reasoning_content"] = self.thinking
        if self.tool_calls:
            out["tool_calls"] = list(self.tool_calls)
        if self.name is not None:
            out["name"] = self.name
        if self.tool_call_id is not None:
            out["tool_call_id"] = self.tool_call_id
        if self.learn is not None:
            out["learn"] = self.learn
        return out

    @classmethod
    def from_dict(cls, turn: Mapping[str, Any]) -> Message:
        """Return the message from the output of `to_dict`."""
        return cls(
            turn["role"],
            turn["content"],
            turn.get("reasoning_content"),
            tuple(turn.get("tool_calls") or ()),
            turn.get("learn"),
            turn.get("name"),
            turn.get("tool_call_id"),
        )


@dataclass(frozen=True, slots=True)
class Dialogue:
    """Turns between a user and an assistant, with the tools that the assistant may call."""

    messages: tuple[Message, ...]
    origin: Origin
    tools: tuple[dict[str, Any], ...] = ()
    meta: dict[str, Any] = field(default_factory=dict)
    unread: tuple[str, ...] = field(default=(), compare=False)  # fields of its row that nothing reads; not written

    def to_dict(self) -> dict[str, Any]:
        out: dict[str, Any] = {"messages": [message.to_dict() for message in self.messages]}
        if self.tools:
            out["tools"] = list(self.tools)
        if self.meta:
            out["meta"] = self.meta
        out["origin"] = {"file": self.origin.file, "row": self.origin.row}
        return out


def from_dict(row: dict[str, Any]) -> Document | Dialogue:
    """Return the record from the output of `to_dict`."""
    origin = Origin(row["origin"]["file"], row["origin"]["row"])
    if "text" in row:
        return Document(row["text"], origin)
    messages = tuple(map(Message.from_dict, row["messages"]))
    return Dialogue(messages, origin, tuple(row.get("tools", ())), row.get("meta", {}))


class Span(NamedTuple):
    """A part of a rendered text. learn: whether the model learns it; answer: whether it is an assistant's answer or its stop
    token; stop: whether it is the stop token alone."""

    text: str
    learn: bool
    answer: bool = False
    stop: bool = False
