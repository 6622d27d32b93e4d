"""What of a conversation a model still sees: its last turns, whole, and the system message."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any


def last_turns(
    messages: Sequence[dict[str, Any]], count: Callable[[list[dict[str, Any]]], int], max_tokens: int
) -> list[dict[str, Any]]:
    """Without the oldest turns, until the rest has no more than `room` tokens. The last question stays, and what a system
    message says before all. count: tokens of a conversation."""
    kept = list(messages)
    first = 1 if kept and kept[0]["role"] == "system" else 0
    while len(kept) - first > 2 and count(kept) > max_tokens:
        del kept[first : first + 2]
    return kept
