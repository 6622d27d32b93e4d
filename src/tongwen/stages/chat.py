"""chat: a model and a terminal in; a conversation out, streamed, with its history cut by whole turns."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from tongwen.speaker import open_speaker
from tongwen.ui.terminal import converse


def run(
    model: str, adapters: Sequence[str], *, template: str, thinking: str, sampling: dict[str, Any], system: str
) -> int:
    """Talk until the user leaves."""
    speaker = open_speaker(model, adapters, template, thinking)
    room = speaker.voice.context - int(sampling["max_new_tokens"])

    def reply(messages: list[dict[str, Any]]) -> Iterator[str]:
        return speaker.stream(messages, **sampling)

    return converse(
        reply, name=model, system=system, count=lambda messages: len(speaker.prompt_ids(messages)), context=room
    )
