"""What all dialogues of one shape have in common when they are rendered: the same literal text around their contents.

Rendering a chat template costs more than tokenising what comes out. But most templates do nothing with a content except
write it. That is proven, not believed: the template is rendered with contents that notice every question asked of them.
Writing, trimming and joining are allowed; a question about a substring is answered with no, and becomes a condition
that a real content must meet; anything else, and the shape has no skeleton and its dialogues are rendered one by one.
Finally awkward contents are rendered both ways and must come out alike.
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
    """The template asked a content for something that a skeleton cannot know."""


@dataclass(frozen=True)
class Slot:
    """A message's content in the text, after the trimmings that the template applied: (method, argument) each."""

    message: int
    steps: tuple[tuple[str, str | None], ...] = ()


class RenderTrace:
    """The slots that were made in one render, and the substrings that contents were asked for."""

    def __init__(self) -> None:
        self.slots: list[Slot] = []
        self.absent: set[str] = set()


class TracedContent(str):
    """A message's content that notices what a template does with it. Its text is its slot's mark."""

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
        """No, and a real content that holds the text has no place in this skeleton."""
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


class ConcatenatedContent(str):
    """A content with other text beside it: it may be written and joined further, nothing else."""

    __add__, __radd__, __hash__ = TracedContent.__add__, TracedContent.__radd__, str.__hash__


def _refuse(*_: Any, **__: Any) -> Any:
    raise ContentInspected


# What Python itself needs of a string, and what writes it.
_PLAIN = set(dir(object)) - {"__eq__", "__ne__", "__lt__", "__le__", "__gt__", "__ge__"} | {"__getnewargs__"}
for _kind in (TracedContent, ConcatenatedContent):
    for _name in set(dir(str)) - _PLAIN - set(vars(_kind)):
        setattr(_kind, _name, _refuse)


@dataclass(frozen=True)
class RenderCache:
    """samples: per sample its spans as (literals and slots, the span's fate); absent: what no content may hold."""

    samples: tuple[tuple[tuple[tuple[str | Slot, ...], Span], ...], ...]
    absent: tuple[str, ...]

    def fits(self, messages: Sequence[Message]) -> bool:
        """Whether these contents are of the kind that the skeleton was proven for."""
        for message in messages:
            if not message.content.strip():
                return False
            for text in self.absent:
                if text in message.content:
                    return False
        return True

    def fill(self, messages: Sequence[Message]) -> list[tuple[Span, ...]]:
        """The spans of each sample with these contents."""
        out = []
        for sample in self.samples:
            spans = []
            for parts, span_type in sample:
                if len(parts) == 1 and parts[0].__class__ is str:
                    spans.append(span_type)  # the same in every dialogue
                    continue
                text = "".join([part if part.__class__ is str else _content(part, messages) for part in parts])  # type: ignore[arg-type]
                spans.append(Span(text, span_type.learn, span_type.answer, span_type.stop))
            out.append(tuple(spans))
        return out


def _content(slot: Slot, messages: Sequence[Message]) -> str:
    text = messages[slot.message].content
    if not slot.steps:
        return text
    for method, characters in slot.steps:
        text = getattr(text, method)(characters)
    return text


def make_render_cache(messages: Sequence[Message], samples: Samples) -> RenderCache | None:
    """The skeleton of a shape, or None. samples(messages, prove) renders: the spans of each sample."""
    trace = RenderTrace()
    try:
        traced = tuple(
            replace(message, content=TracedContent.make(trace, Slot(index))) for index, message in enumerate(messages)
        )
        skeleton = RenderCache(
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


def _is_faithful(skeleton: RenderCache, messages: Sequence[Message], samples: Samples) -> bool:
    """Awkward contents, all alike and each message another, come out as the template itself renders them."""
    for turn in range(len(AWKWARD)):
        filled = tuple(
            replace(message, content=AWKWARD[(turn + index) % len(AWKWARD)]) for index, message in enumerate(messages)
        )
        if skeleton.fits(filled) and skeleton.fill(filled) != samples(filled, True):
            return False
    return True
