"""OpenAI's harmony format: an answer is a series of messages in channels, each with a header.

    <|channel|>analysis<|message|>thinking<|end|><|start|>assistant<|channel|>final<|message|>answer
    <|channel|>commentary to=functions.NAME <|constrain|>json<|message|>{…}<|call|>

A model writes the recipient of a call in more than one place of the header, so no probe tells the form.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from tongwen.core.tool_parser import NAME, NamedCall, ToolParser

TOKENS = ("<|channel|>", "<|message|>", "<|start|>", "<|end|>", "<|constrain|>", "<|call|>", "<|return|>")
RECIPIENT = re.compile(r"to=(?:functions\.)?(?P<name>[^\s<]+)")
CALL = "<|channel|>commentary to=functions."
MESSAGE, ENDED = "<|message|>", re.compile(r"<\|(?:end|call|return|start|channel)\|>")
LONGEST = max(map(len, TOKENS))


def is_written_by(text: str) -> bool:
    return "<|channel|>" in text and MESSAGE in text


def tool_parser() -> ToolParser:
    """Return the parser of calls as `plain_messages` writes them."""
    form = NamedCall(NAME + r"<\|message\|>\s*(?=\{)")
    middle, ended = "<|channel|>commentary json<|message|>", r"(?:<\|call\|>)?"
    return ToolParser(form, " to=functions.", middle, re.escape(CALL), ended, ended, CALL, False, "<|call|>", "")


def plain_messages(pieces: Iterator[str]) -> Iterator[str]:
    """Rewrite an answer: thinking between `<think>` and `</think>`, calls in one form, other text as it is."""
    text, inside, thinking = "", False, False
    for piece in pieces:
        text += piece
        while True:
            if not inside:
                header, found, rest = text.partition(MESSAGE)
                if not found:
                    break
                recipient = RECIPIENT.search(header)
                analysis = recipient is None and "analysis" in header
                if analysis != thinking:
                    yield "<think>" if analysis else "</think>"
                if recipient:
                    yield f"{CALL}{recipient['name']}{MESSAGE}"
                text, inside, thinking = rest, True, analysis
            if ended := ENDED.search(text):
                yield text[: ended.start()]
                text, inside = text[ended.start() :], False
                text = text.removeprefix("<|end|>").removeprefix("<|call|>").removeprefix("<|return|>")
                continue
            held = next((size for size in range(LONGEST - 1, 0, -1) if _may_begin(text[-size:])), 0)
            yield text[: len(text) - held]
            text = text[len(text) - held :]
            break
    if thinking and text and not inside:
        yield "</think>"
    yield text


def _may_begin(tail: str) -> bool:
    return any(token.startswith(tail) for token in TOKENS)
