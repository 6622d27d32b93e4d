"""A conversation as the page keeps it: what of it the model is told, answers as they grow, and what is exported.

The history lives in the browser and comes back with every question, so nothing of one visitor can reach another.
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
# What Markdown and LaTeX show as it is; a fence that is not closed yet reaches to the end.
CODE = re.compile(r"(```.*?(?:```|\Z)|`[^`\n]+`|\$\$.*?\$\$|\\\(.*?\\\)|\\\[.*?\\\])", re.DOTALL)
ENTITY = re.compile(r"&(?=#?\w+;)")
TAG = re.compile(r"<(?=[A-Za-z/!?])(?!/?think>)")
ESCAPED = re.compile("&(?:lt|amp);")
MARKS = {"&lt;": "<", "&amp;": "&"}
PROMPT_CHARACTERS = 100_000
TURNS = 400
REDRAW_SECONDS = 0.05  # an answer is drawn again at most that often; its first piece at once


def model_messages(messages: Sequence[dict[str, Any]], system: str) -> Messages:
    """What the model is told of what the page shows: no notes, and the system message first.

    Raises RecipeError for more than a conversation may hold.
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
    """The text of a message, which Gradio gives as a string or as parts, without what `drawn` did to it."""
    if isinstance(content, list):
        content = "".join(str(part.get("text", "")) if isinstance(part, dict) else str(part) for part in content)
    return _outside_code(str(content), lambda part: ESCAPED.sub(lambda found: MARKS[found[0]], part))


def drawn(text: str) -> str:
    """Text as Markdown in which no HTML is meant: a tag is shown as it was written, and `text_of` takes that back."""
    return _outside_code(text, lambda part: TAG.sub("&lt;", ENTITY.sub("&amp;", part)))


def _outside_code(text: str, change: Callable[[str], str]) -> str:
    return "".join(part if index % 2 else change(part) for index, part in enumerate(CODE.split(text)))


def is_note(message: dict[str, Any]) -> bool:
    """Whether it is the page's own word about an answer that failed."""
    return bool((message.get("metadata") or {}).get("title"))


def note(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": drawn(text), "metadata": {"title": _("no answer")}}


class StreamedAnswer:
    """One model's answer to what stands on its side, as it grows."""

    def __init__(self, backend: ChatBackend, history: Messages, explain: Explain, *request: Any) -> None:
        """asked: model, system message, options."""
        self.backend, self.history, self.explain = backend, history, explain
        self.pieces = self._generate(*request)
        self.forgotten = 0  # turns that the model does not see
        self.text, self.problem, self.finished = "", "", False
        self.start, self.first = time.monotonic(), 0.0

    def _generate(self, name: str, system: str, options: dict[str, Any]) -> Generator[str, None, None]:
        """The answer, with all that may go wrong before its first piece inside of it."""
        messages = model_messages(self.history, system)
        fitted = self.backend.fit(name, messages, options)
        self.forgotten = (len(messages) - len(fitted)) // 2
        yield from self.backend.reply(name, fitted, options)

    def advance(self) -> None:
        """The next piece; what goes wrong becomes a note, and the server lives on."""
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
    """Let the answers grow until all have ended, with a pause wherever they are to be drawn."""
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
    """A link that holds its file: nothing is written on the server."""
    encoded = base64.b64encode(text.encode("utf-8", "replace")).decode()
    link = Markup('<a class="soft" download="{}" href="data:application/octet-stream;base64,{}">{}</a>')
    return link.format(name, encoded, label)
