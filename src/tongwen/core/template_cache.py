"""Cache the render of a chat template for all dialogues of one shape: the literal text around the message contents.

Rendering a chat template costs more than tokenising its output, but most templates only write a content or a thinking and never
inspect it. This is verified: the template is rendered with contents that record every operation on them. Writing, trimming and
concatenating are allowed. A substring test returns False, and real contents must not contain that substring. After any
other operation the shape has no skeleton, and its dialogues are rendered one by one. Finally, awkward contents are rendered
both ways and must give the same text.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from tongwen.core.errors import TongwenError
from tongwen.core.records import Message, Span

SENTINEL = "\ufdd2"  # a noncharacter: Unicode keeps it out of text
_SLOT = re.compile(f"{SENTINEL}(\\d+){SENTINEL}")
AWKWARD = (" 中 a ", "\n\n中\n\n", "\t'\"\\中<&>{{x}}", "a" * 3, "。\n</b>\n ", "#中%s{}")

Samples = Callable[[tuple[Message, ...], bool], list[tuple[Span, ...]]]


class ContentInspected(Exception):
    """The template used an operation on a content that a skeleton cannot reproduce."""


@dataclass(frozen=True)
class Slot:
    """The place of a message's text in the render. field: content or thinking; steps: (method, argument) of each trim that
    the template applied."""

    message: int
    field: str = "content"
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

    def _trimmed(self, method: str, characters: str | None) -> TracedContent:
        return TracedContent.make(self.trace, replace(self.slot, steps=(*self.slot.steps, (method, characters))))

    def strip(self, characters: str | None = None, /) -> TracedContent:
        return self._trimmed("strip", characters)

    def lstrip(self, characters: str | None = None, /) -> TracedContent:
        return self._trimmed("lstrip", characters)

    def rstrip(self, characters: str | None = None, /) -> TracedContent:
        return self._trimmed("rstrip", characters)

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


@dataclass(frozen=True)
class RenderSkeleton:
    """samples: the spans of each sample as (literals and slots, span with the flags); absent: substrings
    that contents must not have."""

    samples: tuple[tuple[tuple[tuple[str | Slot, ...], Span], ...], ...]
    absent: tuple[str, ...]

    def fits(self, messages: Sequence[Message]) -> bool:
        """Whether the skeleton was verified for contents like these."""
        for message in messages:
            thinking = message.thinking
            if not message.content.strip() or (thinking is not None and not thinking.strip()):
                return False
            for text in self.absent:
                if text in message.content or (thinking is not None and text in thinking):
                    return False
        return True

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
    text: str = getattr(messages[slot.message], slot.field)
    if not slot.steps:
        return text
    for method, characters in slot.steps:
        text = getattr(text, method)(characters)
    return text


def make_skeleton(messages: Sequence[Message], samples: Samples) -> RenderSkeleton | None:
    """Return the skeleton of a shape, or None. samples(messages, prove) renders the spans of each sample."""
    trace = RenderTrace()
    try:
        traced = tuple(
            replace(
                message,
                content=TracedContent.make(trace, Slot(index)),
                thinking=message.thinking and TracedContent.make(trace, Slot(index, "thinking")),
            )
            for index, message in enumerate(messages)
        )
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
        filled = tuple(
            replace(
                message,
                content=AWKWARD[(turn + index) % len(AWKWARD)],
                thinking=message.thinking and AWKWARD[(turn + index + 2) % len(AWKWARD)],
            )
            for index, message in enumerate(messages)
        )
        if skeleton.fits(filled) and skeleton.fill(filled) != samples(filled, True):
            return False
    return True
