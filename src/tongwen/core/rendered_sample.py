"""What a render consists of: samples, turns, and what stands around an answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from tongwen.core.message_layout import Turn
from tongwen.core.records import Span


@dataclass(frozen=True)
class RenderedSample:
    """One sample: its spans in order. The last is the stop token of the last answer, learned if that answer is."""

    spans: tuple[Span, ...]

    @property
    def text(self) -> str:
        return "".join(span.text for span in self.spans)

    @property
    def learns_to_stop(self) -> bool:
        """Whether the sample has a learned stop token."""
        return any(span.stop and span.learn for span in self.spans)


class RenderedTurn(NamedTuple):
    """One answer: its prompt as at inference, its text, and the token that ends it."""

    prompt: str
    answer: str
    stop: str

    def spans(self, learn: bool) -> tuple[Span, Span]:
        return Span(self.answer, learn, answer=True), Span(self.stop, learn, answer=True, stop=True)


class TurnShape(NamedTuple):
    """What the template writes around the last answer of rows of one shape. appended: the stop is not in the render;
    after: what follows the stop; head, tail: what stands before the first and behind the last part of the answer."""

    stop: str
    appended: bool
    after: str
    head: str
    tail: str

    def shows_only_content(self, turn: Turn, answer: str) -> bool:
        """Whether the answer is the content as it is, or trimmed, between head and tail."""
        return any(answer == self.head + text + self.tail for text in trims(turn["content"]))


def trims(text: str) -> tuple[str, ...]:
    return text, text.strip(), text.lstrip(), text.rstrip(), text.strip("\n"), text.lstrip("\n")


def join_turns(turns: Sequence[RenderedTurn], answers: Sequence[int], learned: set[int]) -> list[RenderedSample]:
    """Return one sample if each turn's text begins with the turns before it, else one sample per learned turn."""
    spans: list[Span] = []
    text = ""
    for turn, index in zip(turns, answers, strict=True):
        if not turn.prompt.startswith(text):
            return [
                RenderedSample((Span(turn.prompt, False), *turn.spans(True)))
                for turn, index in zip(turns, answers, strict=True)
                if index in learned
            ]
        spans += [Span(turn.prompt[len(text) :], False), *turn.spans(index in learned)]
        text = turn.prompt + turn.answer + turn.stop
    return [RenderedSample(tuple(spans))]
