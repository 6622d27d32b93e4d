"""A conversation on the page: the messages that the model gets, answers as they grow, and the export.

The history lives in the browser and comes back with every question, so no visitor's text can reach another visitor.
"""

from __future__ import annotations

import base64
import json
import re
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any

from markupsafe import Markup

from tongwen.core.errors import RecipeError
from tongwen.core.i18n import _
from tongwen.serving.web.backend import ChatBackend, Messages

Explain = Callable[[Exception], str]
# Text that Markdown and LaTeX show verbatim; an unclosed fence reaches to the end.
CODE = re.compile(r"(```.*?(?:```|\Z)|`[^`\n]+`|\$\$.*?\$\$|\\\(.*?\\\)|\\\[.*?\\\])", re.DOTALL)
ENTITY = re.compile(r"&(?=#?\w+;)")
TAG = re.compile(r"<(?=[A-Za-z/!?])(?!/?think>)")
ESCAPED = re.compile("&(?:lt|amp);")
MARKS = {"&lt;": "<", "&amp;": "&"}
PROMPT_CHARACTERS = 100_000
TURNS = 400
REDRAW_SECONDS = 0.05  # minimum time between two updates of an answer; its first piece is shown at once


def model_messages(messages: Sequence[dict[str, Any]], system: str) -> Messages:
    """Return the page's messages as the model gets them: with the system message first, without the page's notes.

    Raises RecipeError if the conversation or a message is too long.
    """
    if len(messages) > TURNS:
        raise RecipeError(
            _("this conversation has {count} turns").format(count=len(messages)),
            remedy=_("start a new one"),
        )
    turns = [{"role": str(one["role"]), "content": text_of(one["content"])} for one in messages if not (is_note(one))]
    for turn in turns:
        if len(turn["content"]) > PROMPT_CHARACTERS:
            raise RecipeError(
                _("a message has {count:,} characters; the limit is {prompt_characters:,}").format(
                    count=len(turn["content"]), prompt_characters=PROMPT_CHARACTERS
                ),
                remedy=_("shorten it"),
            )
    return [*([{"role": "system", "content": system}] if system.strip() else []), *turns]


def text_of(content: Any) -> str:
    """Return the text of a message, which Gradio gives as a string or as parts; undoes the escaping of `drawn`."""
    if isinstance(content, list):
        content = "".join(str(part.get("text", "")) if isinstance(part, dict) else str(part) for part in content)
    return _outside_code(str(content), lambda part: ESCAPED.sub(lambda found: MARKS[found[0]], part))


def drawn(text: str) -> str:
    """Escape HTML in Markdown, so that a tag is shown as it was written; `text_of` undoes it."""
    return _outside_code(text, lambda part: TAG.sub("&lt;", ENTITY.sub("&amp;", part)))


def _outside_code(text: str, change: Callable[[str], str]) -> str:
    return "".join(part if index % 2 else change(part) for index, part in enumerate(CODE.split(text)))


def is_note(message: dict[str, Any]) -> bool:
    """Return whether the message is a note of the page about a failed answer."""
    return bool((message.get("metadata") or {}).get("title"))


def note(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": drawn(text), "metadata": {"title": _("no answer")}}


class StreamedAnswer:
    """One model's answer to its conversation, as it grows."""

    def __init__(self, backend: ChatBackend, history: Messages, explain: Explain, *request: Any) -> None:
        """request: model, system message, options."""
        self.backend, self.history, self.explain = backend, history, explain
        self.pieces = self._generate(*request)
        self.forgotten = 0  # turns that no longer fit the model's context
        self.text, self.problem, self.finished = "", "", False
        self.start, self.first = time.monotonic(), 0.0

    def _generate(self, name: str, system: str, options: dict[str, Any]) -> Generator[str, None, None]:
        """Yield the answer. Preparing it happens in the generator too, so that every error appears at the first piece."""
        messages = model_messages(self.history, system)
        fitted = self.backend.fit(name, messages, options)
        self.forgotten = (len(messages) - len(fitted)) // 2
        yield from self.backend.reply(name, fitted, options)

    def advance(self) -> None:
        """Append the next piece; an error becomes a note and does not stop the server."""
        try:
            self.text += next(self.pieces)
            self.first = self.first or time.monotonic() - self.start
        except StopIteration:
            self.finished = True
        except Exception as error:
            self.problem, self.finished = self.explain(error), True

    @property
    def messages(self) -> Messages:
        out = [*self.history]
        if self.text:
            out.append({"role": "assistant", "content": drawn(self.text)})
        return [*out, note(self.problem)] if self.problem else out

    @property
    def pace(self) -> str:
        if not (self.finished and self.text):
            return ""
        seconds = max(time.monotonic() - self.start, 1e-9)
        pace = _("first words after {first:.2f} s · {count:.0f} characters/s").format(
            first=self.first, count=len(self.text) / seconds
        )
        if not self.forgotten:
            return pace
        return pace + _(" · the {forgotten} oldest turns no longer fit").format(forgotten=self.forgotten)


def stream(answers: Sequence[StreamedAnswer]) -> Iterator[None]:
    """Let the answers grow until all have ended; yield whenever the page should be updated."""
    last_drawn = 0.0
    try:
        while not all(one.finished for one in answers):
            new = False
            for one in answers:
                if not one.finished:
                    new = new or not one.text
                    one.advance()
            if new or time.monotonic() - last_drawn >= REDRAW_SECONDS:
                yield
                last_drawn = time.monotonic()
        yield
    finally:
        for one in answers:
            one.pieces.close()


def title_of(messages: Messages) -> str:
    question = next((text_of(one["content"]) for one in messages if one["role"] == "user"), "")
    return " ".join(question.split())[:24]


def as_json(messages: Messages, system: str) -> str:
    return json.dumps({"messages": model_messages(messages, system)}, ensure_ascii=False, indent=1)


def as_markdown(messages: Messages, system: str) -> str:
    headings = {"user": _("Question"), "assistant": _("Answer"), "system": _("System")}
    return (
        "\n\n".join(f"## {headings[one['role']]}\n\n{one['content']}" for one in model_messages(messages, system))
        + "\n"
    )


def download_link(name: str, label: str, text: str) -> Markup:
    """Return a link that contains the file itself, so nothing is written on the server."""
    encoded = base64.b64encode(text.encode("utf-8", "replace")).decode()
    link = Markup('<a class="soft" download="{}" href="data:application/octet-stream;base64,{}">{}</a>')
    return link.format(name, encoded, label)
