"""Split a streamed answer at marks: thinking from answer, and text before a stop string.

A mark may be cut anywhere between two pieces, so text that could be the beginning of a mark is held back until it is clear.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from tongwen.core.message_layout import Tools
from tongwen.core.tool_parser import ToolCall, ToolParser, schemas_of

EAGER = 2000  # characters of calls up to which every piece is looked at
OPEN, CLOSE = "<think>", "</think>"


class StreamPart(NamedTuple):
    """A piece of text, and whether it is thinking; or a whole tool call."""

    text: str
    thinking: bool = False
    call: ToolCall | None = None


def split_thinking(pieces: Iterator[str]) -> Iterator[StreamPart]:
    """Separate the thinking at the beginning of an answer (`<think>…</think>`) from the answer; drop the space between."""
    head = ""
    for piece in pieces:
        head += piece
        if not OPEN.startswith(head.lstrip()):
            break
    if not head.lstrip().startswith(OPEN):
        yield StreamPart(head)
        yield from map(StreamPart, pieces)
        return
    text = head.lstrip()[len(OPEN) :].lstrip()
    while CLOSE not in text:
        tail = _partial_mark_length(text, (CLOSE,))
        yield StreamPart(text[: len(text) - tail], thinking=True)
        if (more := next(pieces, None)) is None:
            yield StreamPart(text[len(text) - tail :], thinking=True)
            return
        text = text[len(text) - tail :] + more
    thought, _, text = text.partition(CLOSE)
    yield StreamPart(thought, thinking=True)
    text = text.lstrip()
    while not text and (more := next(pieces, None)) is not None:
        text = more.lstrip()
    yield StreamPart(text)
    yield from map(StreamPart, pieces)


def split_calls(
    parts: Iterator[StreamPart], parser: ToolParser, tools: Tools, parallel: bool = True
) -> Iterator[StreamPart]:
    """Separate tool calls from the answer: each is yielded once it is whole. What turns out to be no call, because it is
    cut off or broken, is text. parallel: whether the answer goes on after its first call."""
    schemas, text, done, opened, next_read = schemas_of(tools), "", 0, False, 0
    for part in parts:
        if part.thinking:
            yield part
            continue
        text += part.text
        if not opened:
            at = parser.find(text)
            opened = at >= 0
            before = at if opened else (0 if parser.anchored and parser.holds_back(text) else _undecided(text, parser))
            yield StreamPart(text[:before].rstrip() if opened else text[:before])
            text = text[before:]
            if not opened and parser.anchored and text == "" and before:
                yield from parts
                return
        if opened and len(text) >= next_read:
            next_read = len(text) + max(len(text) - EAGER, 0) // 8  # so that reading a long answer takes linear time
            calls, _rest = parser.read(text, schemas)
            yield from (StreamPart("", call=call) for call in calls[done : None if parallel else 1])
            done = len(calls)
            if done and not parallel:
                return
    calls, rest = parser.read(text, schemas) if opened else ([], text)
    yield from (StreamPart("", call=call) for call in calls[done : None if parallel else 1])
    yield StreamPart(rest)


def _undecided(text: str, parser: ToolParser) -> int:
    """Return where the end of a text begins that could belong to a call: blanks, and the beginning of a mark."""
    kept = text[: len(text) - _partial_mark_length(text, (parser.mark,))] if not parser.anchored else text
    return len(kept.rstrip())


def until(pieces: Iterator[str], stops: Sequence[str]) -> Iterator[str]:
    """Yield the text before the first stop string."""
    text = ""
    for piece in pieces:
        text += piece
        if found := [position for stop in stops if (position := text.find(stop)) >= 0]:
            yield text[: min(found)]
            return
        tail = _partial_mark_length(text, stops)
        yield text[: len(text) - tail]
        text = text[len(text) - tail :]
    yield text


def _partial_mark_length(text: str, marks: Sequence[str]) -> int:
    """Return how many characters at the end could be the beginning of a mark."""
    return max(
        (size for mark in marks for size in range(1, min(len(mark), len(text) + 1)) if text.endswith(mark[:size])),
        default=0,
    )
