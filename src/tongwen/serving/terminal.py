"""A conversation in the terminal: streamed, several turns, Ctrl-C stops an answer and Ctrl-D leaves.

What a model says is shown as text and never obeyed: control characters, which could set the title, write to the
clipboard or hide what stands there, are printed escaped.
"""

from __future__ import annotations

import io
import json
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tongwen.core import artifact, console
from tongwen.core.errors import RecipeError, TongwenError
from tongwen.core.i18n import N_, _
from tongwen.serving.last_turns import last_turns
from tongwen.serving.stream_split import StreamPart, split_thinking

Messages = list[dict[str, Any]]
# All control characters but newline and tab, overrides of the writing direction, and halves of a surrogate pair.
UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
COMMANDS = N_("/clear  /system TEXT  /retry  /save FILE  /thinking  /set NAME VALUE  /exit")


@dataclass
class TerminalChat:
    """What is being said, and how.

    reply:    (messages, settings, called with each new token) -> the answer in pieces
    count:    tokens of a conversation
    check:    raises TongwenError when settings are none
    context:  tokens that fit, prompt and answer together
    settings: max_new_tokens, temperature, …
    """

    reply: Callable[[Messages, dict[str, Any], Callable[[int], None]], Iterator[str]]
    count: Callable[[Messages], int]
    check: Callable[[dict[str, Any]], object]
    context: int
    settings: dict[str, Any]
    stream: bool = True
    messages: Messages = field(default_factory=list)
    thought: str = ""

    def start(self, system: str) -> None:
        self.messages = [{"role": "system", "content": system}] if system else []

    def ask(self, question: str) -> None:
        """Put a question and show the answer; a question that got none is forgotten."""
        self.messages.append({"role": "user", "content": question})
        self.answer()

    def answer(self) -> None:
        """Answer the last question; remember what was said, also when it was stopped in the middle."""
        try:
            self._cut_to_fit()
            text = self._show()
        except TongwenError as error:
            console.error(error.text())
            self.messages.pop()
            return
        if text or self.thought:
            thinking = {"reasoning_content": self.thought.strip()} if self.thought else {}
            self.messages.append({"role": "assistant", "content": text, **thinking})
        else:
            self.messages.pop()

    def _show(self) -> str:
        """Print the answer; thinking is folded into one line. Returns the answer without its thinking."""
        self.thought, text, tokens = "", "", 0
        began = time.monotonic()

        def heard(index: int) -> None:
            nonlocal tokens
            tokens += 1

        with closing(_Shown(self.stream)) as shown:
            try:
                for part in split_thinking(self.reply(list(self.messages), self.settings, heard)):
                    shown.add(part)
                    if part.thinking:
                        self.thought += part.text
                    else:
                        text += part.text
            except KeyboardInterrupt:
                shown.stopped = True
        if sys.stdout.isatty():
            seconds = max(time.monotonic() - began, 1e-9)
            speed = _("{tokens:.1f} tokens/s · {count:.1f} characters/s").format(
                tokens=tokens / seconds, count=len(self.thought + text) / seconds
            )
            console.SCREEN.console.print(f"[dim]{speed}[/]")
        return text

    def _cut_to_fit(self) -> None:
        """Drop the oldest whole turns until the conversation fits; the system message stays. A question that could not be
        answered even alone costs no turn."""
        room = self.context - self.settings["max_new_tokens"]
        messages = last_turns(self.messages, self.count, room)
        dropped = (len(self.messages) - len(messages)) // 2
        if dropped and self.count(messages) < self.context:
            self.messages = messages
            console.notice(_("the {dropped} oldest turns no longer fit and are forgotten").format(dropped=dropped))

    def command(self, line: str) -> bool:
        """Do what a line with a slash says; False to leave."""
        word, _unused, rest = line.partition(" ")
        rest = rest.strip()
        if word in ("/exit", "/quit", "/stop"):
            return False
        if word == "/clear":
            self.messages = [turn for turn in self.messages[:1] if turn["role"] == "system"]
            console.success(_("started a new conversation"))
        elif word == "/system":
            self.start(rest)
            console.success(_("started a new conversation with this system message"))
        elif word == "/retry":
            self._retry()
        elif word == "/save":
            self._save(Path(rest or "chat.json"))
        elif word == "/thinking":
            print(visible(self.thought or _("the last answer has no thinking")))
        elif word == "/set":
            self._set(rest)
        else:
            console.info(_(COMMANDS))
        return True

    def _retry(self) -> None:
        if self.messages and self.messages[-1]["role"] == "assistant":
            self.messages.pop()
            self.answer()
        else:
            console.info(_("no answer yet"))

    def _save(self, file: Path) -> None:
        try:
            artifact.write_json(file, {"messages": self.messages})
        except OSError as error:
            console.error(f"{file}: {error.strerror}")
        else:
            console.success(str(file))

    def _set(self, rest: str) -> None:
        """`temperature 0.7`; alone it shows what is set."""
        name, _unused, value = rest.partition(" ")
        if name:
            try:
                changed = self.settings | {name: _read_number(name, value)}
                self.check(changed)
            except TongwenError as error:
                console.error(error.text())
                return
            self.settings = changed
        console.info("  ".join(f"{name} {value}" for name, value in self.settings.items()))


def converse(talk: TerminalChat, *, name: str, system: str) -> int:
    """Read a line, answer it, until the user leaves."""
    console.header(name, _("/help for commands, Ctrl-D to leave"))
    talk.start(system)
    read = _reader()
    while True:
        try:
            line = read().strip()
        except EOFError:
            return 0
        except KeyboardInterrupt:
            continue
        if line.startswith("/"):
            if not talk.command(line):
                return 0
        elif line:
            talk.ask(line)


def visible(text: str) -> str:
    """The text as it may be printed: what a terminal would obey is escaped."""
    return UNSAFE.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


class _Shown:
    """An answer on the screen: piece by piece, or at its end; its thinking as one grey line that counts."""

    def __init__(self, stream: bool) -> None:
        self.stream, self.stopped = stream, False
        self.waiting, self.thought = "", 0

    def add(self, part: StreamPart) -> None:
        if part.thinking:
            self.thought += len(part.text)
            if sys.stdout.isatty():
                self._grey("\r")
            return
        if part.text and self.thought:
            self._unfold()
        if self.stream:
            print(visible(part.text), end="", flush=True)
        else:
            self.waiting += part.text

    def close(self) -> None:
        if self.thought:
            self._unfold()
        print(visible(self.waiting) + (_(" …stopped") if self.stopped else ""))

    def _unfold(self) -> None:
        self._grey("\r" if sys.stdout.isatty() else "")
        print()
        self.thought = 0

    def _grey(self, start: str) -> None:
        words = _("thinking, {thought} characters (/thinking shows it)").format(thought=self.thought)
        print(f"{start}\x1b[2m{words}\x1b[0m" if start else words, end="", flush=True)


def _reader() -> Callable[[], str]:
    """How a question is read: from a terminal with Python's own line editor, which knows how wide a character is."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")
    if not sys.stdin.isatty():
        return input
    with suppress(ImportError):  # on Windows the console itself edits the line
        import readline

        readline.parse_and_bind("set enable-bracketed-paste on")  # several lines that are pasted are one question
    prompt = _("\nyou › ")
    return lambda: input(prompt)


def _read_number(name: str, value: str) -> Any:
    try:
        number = json.loads(value)
    except ValueError:
        number = None
    if isinstance(number, (int, float)) and not isinstance(number, bool):
        return number
    raise RecipeError(
        _("{value!r} is not a number").format(value=value), place=f"/set {name}", remedy="/set temperature 0.7"
    )
