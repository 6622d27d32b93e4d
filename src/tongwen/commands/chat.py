"""chat: talk to a model in the terminal. Answers are streamed; the history is cut by whole turns."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from tongwen.infer.generation import Sampling
from tongwen.serving.terminal import TerminalChat, converse
from tongwen.workflows.chat_model import open_chat_model


def run(
    model: str,
    adapters: Sequence[str],
    *,
    template: str,
    thinking: str,
    weights: str,
    sampling: dict[str, Any],
    system: str,
    stream: bool,
) -> int:
    """Run the conversation until the user leaves."""
    Sampling().override(**sampling)
    chat_model = open_chat_model(model, adapters, template, thinking, weights=weights, rows=1)

    def reply(
        messages: list[dict[str, Any]], settings: dict[str, Any], on_token: Callable[[int], None]
    ) -> Iterator[str]:
        return chat_model.stream(messages, on_token, **settings)

    chat = TerminalChat(
        reply=reply,
        count=lambda messages: len(chat_model.prompt_ids(messages)),
        check=lambda settings: Sampling().override(**settings),
        context=chat_model.context,
        settings=sampling,
        stream=stream,
    )
    return converse(chat, name=model, system=system)
