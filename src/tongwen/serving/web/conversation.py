"""A conversation on the page: the messages that the model gets, and an answer as it grows.

The history lives in the browser and comes back with every question, so no visitor's text can reach another visitor.
"""

from __future__ import annotations

import time
from collections.abc import Generator
from contextlib import suppress
from typing import Any

from tongwen.core.errors import RecipeError
from tongwen.core.i18n import _
from tongwen.serving.web.backend import ChatBackend, Messages
from tongwen.serving.web.explain import explain

PROMPT_CHARACTERS = 100_000
TURNS = 400


def model_messages(turns: Messages, system: str) -> Messages:
    """Return the messages as the model gets them, the system message first.

    Raises RecipeError if the conversation or a message is too long.
    """
    if len(turns) > TURNS:
        raise RecipeError(
            _("this conversation has {count} turns").format(count=len(turns)),
            remedy=_("start a new one"),
        )
    messages = [*([{"role": "system", "content": system}] if system.strip() else []), *turns]
    for message in messages:
        if len(message["content"]) > PROMPT_CHARACTERS:
            raise RecipeError(
                _("a message has {count:,} characters; the limit is {prompt_characters:,}").format(
                    count=len(message["content"]), prompt_characters=PROMPT_CHARACTERS
                ),
                remedy=_("shorten it"),
            )
    return messages


class StreamedAnswer:
    """One model's answer to its conversation, as it grows. problem: why it ended before its end; pace: how fast it was."""

    def __init__(self, backend: ChatBackend, name: str, turns: Messages, system: str, options: dict[str, Any]) -> None:
        self.backend, self.turns = backend, turns
        self.forgotten = 0  # turns that no longer fit the model's context
        self.characters, self.problem = 0, ""
        self.start, self.first = time.monotonic(), 0.0
        self.request = name, system, options

    def pieces(self) -> Generator[str, None, None]:
        """Yield the answer; an error ends it and becomes its `problem`."""
        name, system, options = self.request
        try:
            messages = model_messages(self.turns, system)
            fitted = self.backend.fit(name, messages, options)
            self.forgotten = (len(messages) - len(fitted)) // 2
            reply = self.backend.reply(name, fitted, options)
            try:
                for piece in reply:
                    self.first = self.first or time.monotonic() - self.start
                    self.characters += len(piece)
                    yield piece
            finally:
                with suppress(AttributeError):  # an iterator that is no generator has nothing to give up
                    reply.close()  # type: ignore[attr-defined]
        except Exception as error:
            self.problem = explain(error)

    @property
    def pace(self) -> str:
        if not self.characters:
            return ""
        seconds = max(time.monotonic() - self.start, 1e-9)
        pace = _("first words after {first:.2f} s · {count:.0f} characters/s").format(
            first=self.first, count=self.characters / seconds
        )
        if not self.forgotten:
            return pace
        return pace + _(" · the {forgotten} oldest turns no longer fit").format(forgotten=self.forgotten)
