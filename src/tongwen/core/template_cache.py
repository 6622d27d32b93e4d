"""Cache the render of a chat template for all dialogues of one shape: the literal text around the texts of its messages.

Rendering a chat template costs more than tokenising its output, but most templates only write a content, a thinking, an id or the
text of an argument and never inspect it. This is verified: the template is rendered with texts that record every operation on
them. Writing, trimming, concatenating and writing as JSON are allowed. A substring test returns False, and real texts must not
contain that substring. After any other operation the shape has no skeleton, and its dialogues are rendered one by one. Finally,
awkward texts are rendered both ways and must give the same.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from tongwen.core.errors import TongwenError
from tongwen.core.records import Message, Span

TAGS = frozenset(("<", "[", "◁"))  # begin a tag: such a text is never rendered from a skeleton
SENTINEL = "\ufdd2"  # a noncharacter: Unicode keeps it out of text
_SLOT = re.compile(f"{SENTINEL}(\\d+){SENTINEL}")
AWKWARD = (" 中 a ", "\n\n中\n\n", "\t'\"\\中<&>{{x}}", "a" * 3, "。\n</b>\n ", "#中%s{}")

Samples = Callable[[tuple[Message, ...], bool], list[tuple[Span, ...]]]


class ContentInspected(Exception):
    """The template used an operation on a content that a skeleton cannot reproduce."""


@dataclass(frozen=True)
class Slot:
    """A text of a message, as the template writes it. path: the field, and the way to an argument of a call; steps: (method,
    argument) of each change: a trim, or `json`, which escapes the text."""

    message: int
    path: tuple[str | int, ...] = ("content",)
    steps: tuple[tuple[str, str | None], ...] = ()


class RenderTrace:
    """The slots of one render, and the substrings that the template looked for in contents."""

    def __init__(self) -> None:
        self.slots: list[Slot] = []
        self.absent: set[str] = set()


class TracedContent(str):
    """A message content that records what a template does with it. Its text is the mark of its slot."""

    trace: RenderTrace
    slot: Slot

    @staticmethod
    def make(trace: RenderTrace, slot: Slot) -> TracedContent:
        if slot not in trace.slots:  # the same in every render, so that renders can be compared
            trace.slots.append(slot)
        out = TracedContent(f"{SENTINEL}{trace.slots.index(slot)}{SENTINEL}")
        out.trace, out.slot = trace, slot
        return out

    def changed(self, method: str, characters: str | None) -> TracedContent:
        return TracedContent.make(self.trace, replace(self.slot, steps=(*self.slot.steps, (method, characters))))

    def strip(self, characters: str | None = None, /) -> TracedContent:
        return self.changed("strip", characters)

    def lstrip(self, characters: str | None = None, /) -> TracedContent:
        return self.changed("lstrip", characters)

    def rstrip(self, characters: str | None = None, /) -> TracedContent:
        return self.changed("rstrip", characters)

    def _record_absent(self, text: Any) -> bool:
        """Return False, and record that real contents for this skeleton must not contain the text."""
        for one in text if isinstance(text, tuple) else (text,):
            if not isinstance(one, str) or not one:
                raise ContentInspected
            self.trace.absent.add(one)
        return False

    def __contains__(self, text: object) -> bool:
        return self._record_absent(text)

    def startswith(self, text: Any, *place: Any) -> bool:
        return self._record_absent(text)

    def endswith(self, text: Any, *place: Any) -> bool:
        return self._record_absent(text)

    def __bool__(self) -> bool:
        if self.slot.steps:  # a trimmed content may be empty
            raise ContentInspected
        return True

    def __add__(self, other: str) -> ConcatenatedContent:
        return ConcatenatedContent(str.__add__(self, other))

    def __radd__(self, other: str) -> ConcatenatedContent:
        return ConcatenatedContent(str.__add__(other, self))

    __hash__ = str.__hash__


def dump_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    """Return a value as JSON, in which a traced content remains one."""
    text = json.dumps(value, ensure_ascii=ensure_ascii, **options)
    if (json.dumps(SENTINEL)[1:-1] if ensure_ascii else SENTINEL) not in text or not find_trace(value):
        return text
    escaped = json.dumps(_escape(value, "ascii" if ensure_ascii else None), ensure_ascii=False, **options)
    return ConcatenatedContent(escaped)


def _escape(value: Any, how: str | None) -> Any:
    if isinstance(value, dict):
        return {key: _escape(inner, how) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_escape(inner, how) for inner in value]
    if isinstance(value, ConcatenatedContent):
        raise ContentInspected
    return value.changed("json", how) if isinstance(value, TracedContent) else value


def find_trace(value: Any) -> RenderTrace | None:
    """Return the trace of the first traced content among messages; None for ordinary ones."""
    if isinstance(value, TracedContent):
        return value.trace
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return next(filter(None, map(find_trace, parts)), None)


def revive(value: Any, trace: RenderTrace) -> Any:
    """Return messages with traced contents in place of the marks of slots."""
    if isinstance(value, dict):
        return {key: revive(one, trace) for key, one in value.items()}
    if isinstance(value, list):
        return [revive(one, trace) for one in value]
    found = _SLOT.fullmatch(value) if isinstance(value, str) else None
    return TracedContent.make(trace, trace.slots[int(found[1])]) if found else value


class ConcatenatedContent(str):
    """A content concatenated with other text: it may be written or concatenated further, nothing else."""

    __add__, __radd__, __hash__ = TracedContent.__add__, TracedContent.__radd__, str.__hash__


def _refuse(*_: Any, **__: Any) -> Any:
    raise ContentInspected


# Methods that Python itself needs on a string, or that write it.
_PLAIN = set(dir(object)) - {"__eq__", "__ne__", "__lt__", "__le__", "__gt__", "__ge__"} | {"__getnewargs__"}
for _kind in (TracedContent, ConcatenatedContent):
    for _name in set(dir(str)) - _PLAIN - set(vars(_kind)):
        setattr(_kind, _name, _refuse)


def outline(messages: Sequence[Message]) -> tuple[Any, ...] | None:
    """Return what two dialogues have in common when one skeleton serves both: all but the texts that it has slots for. None when
    there is none."""
    ids: dict[str | None, int] = {None: 0}  # an answer names the id of its call
    out: list[Any] = []
    for message in messages:
        thought = message.thinking
        if message.content.lstrip()[:1] in TAGS or (thought is not None and thought.lstrip()[:1] in TAGS):
            return None
        out += message.role, message.learn, thought is not None
        if not message.tool_calls and message.name is None and message.tool_call_id is None:
            continue
        out += not message.content, message.name, ids.setdefault(message.tool_call_id, len(ids))
        for call in message.tool_calls:
            inner = call["function"]
            out += ids.setdefault(call.get("id"), len(ids)), inner["name"], _kinds(inner["arguments"])
    return tuple(out)


def _kinds(value: Any) -> Any:
    """Return a value with None for each text."""
    if isinstance(value, dict):
        return "{", *((key, _kinds(inner)) for key, inner in value.items())
    if isinstance(value, list):
        return "[", *map(_kinds, value)
    if isinstance(value, str) and value.strip():
        return None
    return type(value), value  # 1, 1.0 and true are equal for Python


Change = Callable[[Slot, str], str]


def _change_texts(messages: Sequence[Message], change: Change) -> tuple[Message, ...]:
    """Return the messages with each text that has a slot changed."""
    ids: dict[str, str] = {}

    def new_id(slot: Slot, text: str) -> str:
        if text not in ids:
            ids[text] = change(slot, text)
        return ids[text]

    out = []
    for index, message in enumerate(messages):
        calls = []
        for number, call in enumerate(message.tool_calls):
            path = "tool_calls", number
            inner = call["function"]
            arguments = _change_values(inner["arguments"], Slot(index, (*path, "function", "arguments")), change)
            call = {**call, "function": {**inner, "arguments": arguments}}
            if call.get("id") is not None:
                call["id"] = new_id(Slot(index, (*path, "id")), call["id"])
            calls.append(call)
        named = message.tool_call_id
        out.append(
            replace(
                message,
                content=message.content and change(Slot(index), message.content),
                thinking=message.thinking and change(Slot(index, ("thinking",)), message.thinking),
                tool_calls=tuple(calls),
                tool_call_id=named and new_id(Slot(index, ("tool_call_id",)), named),
            )
        )
    return tuple(out)


def _change_values(value: Any, slot: Slot, change: Change) -> Any:
    if isinstance(value, dict):
        return {
            key: _change_values(inner, replace(slot, path=(*slot.path, key)), change) for key, inner in value.items()
        }
    if isinstance(value, list):
        return [_change_values(inner, replace(slot, path=(*slot.path, key)), change) for key, inner in enumerate(value)]
    return change(slot, value) if isinstance(value, str) and value.strip() else value


@dataclass(frozen=True)
class RenderSkeleton:
    """samples: the spans of each sample as (literals and slots, span with the flags); absent: substrings
    that contents must not have."""

    samples: tuple[tuple[tuple[tuple[str | Slot, ...], Span], ...], ...]
    absent: tuple[str, ...]

    def fits(self, messages: Sequence[Message]) -> bool:
        """Whether the skeleton was verified for texts like these."""
        for message in messages:
            thinking = message.thinking
            if not message.content.strip() and (message.content or not message.tool_calls):
                return False
            if thinking is not None and not thinking.strip():
                return False
            for text in self.absent:
                if text in message.content or (thinking is not None and text in thinking):
                    return False
            if (message.tool_calls or message.tool_call_id) and self._refuses(message):
                return False
        return True

    def _refuses(self, message: Message) -> bool:
        texts: list[str] = []
        _change_texts([message], lambda _slot, text: texts.append(text) or text)  # type: ignore[func-returns-value]
        return any(absent in text for absent in self.absent for text in texts)

    def fill(self, messages: Sequence[Message]) -> list[tuple[Span, ...]]:
        """Return the spans of each sample with these contents."""
        out = []
        for sample in self.samples:
            spans = []
            for parts, flags in sample:
                if len(parts) == 1 and parts[0].__class__ is str:
                    spans.append(flags)  # the same in every dialogue
                    continue
                text = "".join([part if part.__class__ is str else _content(part, messages) for part in parts])  # type: ignore[arg-type]
                spans.append(Span(text, flags.learn, flags.answer, flags.stop))
            out.append(tuple(spans))
        return out


def _content(slot: Slot, messages: Sequence[Message]) -> str:
    field, *path = slot.path
    text: Any = getattr(messages[slot.message], str(field))
    for key in path:
        text = text[key]
    for method, characters in slot.steps:
        text = (
            json.dumps(text, ensure_ascii=characters == "ascii")[1:-1]
            if method == "json"
            else getattr(text, method)(characters)
        )
    return str(text)


def make_skeleton(messages: Sequence[Message], samples: Samples) -> RenderSkeleton | None:
    """Return the skeleton of a shape, or None. samples(messages, prove) renders the spans of each sample."""
    trace = RenderTrace()
    try:
        traced = _change_texts(messages, lambda slot, text: TracedContent.make(trace, slot))
        skeleton = RenderSkeleton(
            tuple(tuple((_parts(span.text, trace), span) for span in sample) for sample in samples(traced, False)),
            tuple(sorted(trace.absent)),
        )
        if not _is_faithful(skeleton, messages, samples):
            return None
    except (ContentInspected, TongwenError):
        return None
    return skeleton


def _parts(text: str, trace: RenderTrace) -> tuple[str | Slot, ...]:
    pieces = _SLOT.split(text)  # literal, number, literal, ...
    return tuple(
        trace.slots[int(piece)] if place % 2 else piece for place, piece in enumerate(pieces) if place % 2 or piece
    )


def _is_faithful(skeleton: RenderSkeleton, messages: Sequence[Message], samples: Samples) -> bool:
    """Whether the skeleton renders awkward contents exactly as the template does."""
    for turn in range(len(AWKWARD)):
        filled = _change_texts(messages, lambda slot, text, turn=turn: _awkward(slot, turn))  # type: ignore[misc]
        if skeleton.fits(filled) and skeleton.fill(filled) != samples(filled, True):
            return False
    return True


def _awkward(slot: Slot, turn: int) -> str:
    """Return the text for a slot in one of the trials."""
    if slot.path[-1] in ("id", "tool_call_id"):
        return f"{AWKWARD[turn % len(AWKWARD)]}{slot}"  # one id for each call
    return AWKWARD[(turn + slot.message + 2 * (slot.path != ("content",))) % len(AWKWARD)]
