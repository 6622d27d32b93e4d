"""Records that all stages share: Document, Dialogue with its Messages, Preference, and the Spans of a rendered text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, TypeAlias


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


@dataclass(frozen=True, slots=True)
class Preference:
    """A prompt with the answer that people preferred and one that they did not. Unpaired data (KTO) have only one of them."""

    prompt: tuple[Message, ...]
    chosen: tuple[Message, ...]
    rejected: tuple[Message, ...]
    origin: Origin
    tools: tuple[dict[str, Any], ...] = ()
    unread: tuple[str, ...] = field(default=(), compare=False)  # fields of its row that nothing reads; not written

    @property
    def is_pair(self) -> bool:
        return bool(self.chosen and self.rejected)

    @property
    def dialogues(self) -> list[Dialogue]:
        """The prompt with the chosen answer, then with the rejected one, as far as they exist; only the answer is learned."""
        asked = tuple(
            replace(message, learn=False) if message.role == "assistant" else message for message in self.prompt
        )
        answers = (answer for answer in (self.chosen, self.rejected) if answer)
        return [Dialogue((*asked, *answer), self.origin, self.tools) for answer in answers]

    def to_dict(self) -> dict[str, Any]:
        """Return the dictionary in TRL's conversational form."""
        parts: dict[str, Any] = {"prompt": self.prompt}
        if self.is_pair:
            parts |= {"chosen": self.chosen, "rejected": self.rejected}
        else:
            parts["completion"] = self.chosen or self.rejected
        out: dict[str, Any] = {name: [message.to_dict() for message in part] for name, part in parts.items()}
        if not self.is_pair:
            out["label"] = bool(self.chosen)
        if self.tools:
            out["tools"] = list(self.tools)
        out["origin"] = {"file": self.origin.file, "row": self.origin.row}
        return out

    @classmethod
    def from_dict(cls, row: Mapping[str, Any]) -> Preference:
        """Return the record from the output of `to_dict`."""
        if "completion" in row:
            row = {**row, "chosen" if row["label"] else "rejected": row["completion"]}
        prompt, chosen, rejected = (
            tuple(map(Message.from_dict, row.get(name, ()))) for name in ("prompt", "chosen", "rejected")
        )
        origin = Origin(row["origin"]["file"], row["origin"]["row"])
        return cls(prompt, chosen, rejected, origin, tuple(row.get("tools", ())))


Record: TypeAlias = Document | Dialogue | Preference


def from_dict(row: dict[str, Any]) -> Record:
    """Return the record from the output of `to_dict`."""
    origin = Origin(row["origin"]["file"], row["origin"]["row"])
    if "text" in row:
        return Document(row["text"], origin)
    if "prompt" in row:
        return Preference.from_dict(row)
    messages = tuple(map(Message.from_dict, row["messages"]))
    return Dialogue(messages, origin, tuple(row.get("tools", ())), row.get("meta", {}))


class Span(NamedTuple):
    """A part of a rendered text. learn: whether the model learns it; answer: whether it is an assistant's answer or its stop
    token; stop: whether it is the stop token alone."""

    text: str
    learn: bool
    answer: bool = False
    stop: bool = False
