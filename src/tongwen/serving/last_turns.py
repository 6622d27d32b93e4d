"""Cut a conversation to the model's context: keep the system message and the last whole turns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any


def last_turns(
    messages: Sequence[dict[str, Any]], count: Callable[[list[dict[str, Any]]], int], max_tokens: int
) -> list[dict[str, Any]]:
    """Drop the oldest turns until the rest has at most `max_tokens` tokens: a question with all that follows it up to the
    next one, such as calls of tools and their answers. The system message and the last question stay.
    count: returns the tokens of a conversation."""
    kept = list(messages)
    first = 1 if kept and kept[0]["role"] == "system" else 0
    while (later := _second_question(kept, first)) and count(kept) > max_tokens:
        del kept[first:later]
    return kept


def _second_question(messages: Sequence[dict[str, Any]], first: int) -> int:
    """Return where the second question stands, 0 if there is none."""
    return next((at for at in range(first + 1, len(messages)) if messages[at]["role"] == "user"), 0)
