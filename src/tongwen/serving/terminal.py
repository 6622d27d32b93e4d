"""A conversation in the terminal: streamed, several turns, Ctrl-C stops an answer and Ctrl-D leaves.

The terminal never interprets a model's output: control characters, which could set the title, write to the clipboard or
hide text, are printed escaped.
"""

from __future__ import annotations

import io
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tongwen.core import artifact, console, originals
from tongwen.core.errors import RecipeError, TongwenError
from tongwen.core.i18n import N_, _
from tongwen.core.stop_signals import StopSignal
from tongwen.core.terminal_text import visible
from tongwen.core.tool_parser import ToolParser
from tongwen.serving.last_turns import last_turns
from tongwen.serving.stream_split import StreamPart, split_calls, split_thinking

Messages = list[dict[str, Any]]
COMMANDS = N_("/clear  /system TEXT  /retry  /save FILE  /thinking  /tool ANSWER  /set NAME VALUE  /exit")


@dataclass
class TerminalChat:
    """A conversation and the model that answers it.

    reply:    (messages, settings, callback for each new token) -> the answer in pieces
    count:    returns the tokens of a conversation
    check:    raises TongwenError for invalid settings
    context:  maximum number of tokens, prompt and answer together
    settings: max_new_tokens, temperature, …
    saved:    file that `/save` wrote -> its hash
    tools:    that the model may call; parser: of its calls
    """

    reply: Callable[[Messages, dict[str, Any], Callable[[int], None]], Iterator[str]]
    count: Callable[[Messages], int]
    check: Callable[[dict[str, Any]], object]
    context: int
    settings: dict[str, Any]
    stream: bool = True
    messages: Messages = field(default_factory=list)
    thought: str = ""
    calls: list[dict[str, Any]] = field(default_factory=list)
    saved: dict[Path, str] = field(default_factory=dict)
    tools: list[dict[str, Any]] = field(default_factory=list)
    parser: ToolParser | None = None

    @property
    def open_calls(self) -> list[dict[str, Any]]:
        """The calls of the last answer that nobody has answered yet."""
        answered = 0
        while answered < len(self.messages) and self.messages[-1 - answered]["role"] == "tool":
            answered += 1
        last = self.messages[-1 - answered] if answered < len(self.messages) else {}
        return list(last.get("tool_calls", ()))[answered:]

    def read(self, line: str) -> None:
        """Take a line as the answer of a called tool, or as a question."""
        if not (calls := self.open_calls):
            self.ask(line)
            return
        called = {"tool_call_id": calls[0]["id"], "name": calls[0]["function"]["name"]}
        self.messages.append({"role": "tool", "content": line, **called})
        if len(calls) == 1:
            self.answer()
        else:
            self._ask_for_tool()

    def _ask_for_tool(self) -> None:
        if calls := self.open_calls:
            console.info(_("the answer of {name}?").format(name=calls[0]["function"]["name"]))

    def start(self, system: str) -> None:
        self.messages = [{"role": "system", "content": system}] if system else []

    def ask(self, question: str) -> None:
        """Ask a question and print the answer; a question without an answer is dropped from the history."""
        self.messages.append({"role": "user", "content": question})
        self.answer()

    def answer(self) -> None:
        """Answer the last question and keep the answer in the history, even if it was interrupted."""
        try:
            self._truncate_history()
            text = self._show()
        except TongwenError as error:
            console.error(error.text())
            self.messages.pop()
            return
        if text or self.thought or self.calls:
            extra: dict[str, Any] = {"reasoning_content": self.thought.strip()} if self.thought else {}
            if self.calls:
                extra["tool_calls"] = self.calls
            self.messages.append({"role": "assistant", "content": text, **extra})
            self._ask_for_tool()
        else:
            self.messages.pop()

    def _parts(self, on_token: Callable[[int], None]) -> Iterator[StreamPart]:
        parts = split_thinking(self.reply(list(self.messages), self.settings, on_token))
        return split_calls(parts, self.parser, self.tools) if self.parser else parts

    def _show(self) -> str:
        """Print the answer, its thinking folded into one line, and its calls. Returns the answer without its thinking."""
        self.thought, self.calls, text, tokens = "", [], "", 0
        start = time.monotonic()

        def on_token(index: int) -> None:
            nonlocal tokens
            tokens += 1

        with closing(_AnswerDisplay(self.stream)) as display:
            try:
                for part in self._parts(on_token):
                    display.add(part)
                    if part.call:
                        call = part.call.to_dict(f"call{len(self.messages):04}{len(self.calls)}")
                        self.calls.append(call)
                    elif part.thinking:
                        self.thought += part.text
                    else:
                        text += part.text
            except StopSignal:
                raise
            except KeyboardInterrupt:
                display.stopped = True
        if sys.stdout.isatty():
            seconds = max(time.monotonic() - start, 1e-9)
            speed = _("{tokens:.1f} tokens/s · {count:.1f} characters/s").format(
                tokens=tokens / seconds, count=len(self.thought + text) / seconds
            )
            console.show(console.styled((speed, "dim")))
        return text

    def _truncate_history(self) -> None:
        """Drop the oldest whole turns until the conversation fits; the system message stays. Drop nothing for a question
        that is too long even alone."""
        max_tokens = self.context - self.settings["max_new_tokens"]
        messages = last_turns(self.messages, self.count, max_tokens)
        dropped = sum(turn["role"] == "user" for turn in self.messages) - sum(
            turn["role"] == "user" for turn in messages
        )
        if dropped and self.count(messages) < self.context:
            self.messages = messages
            console.notice(_("the {dropped} oldest turns no longer fit and are forgotten").format(dropped=dropped))

    def command(self, line: str) -> bool:
        """Run a slash command. Returns False to leave."""
        name, _unused, argument = line.partition(" ")
        argument = argument.strip()
        if name in ("/exit", "/quit", "/stop"):
            return False
        if name == "/clear":
            self.messages = [turn for turn in self.messages[:1] if turn["role"] == "system"]
            console.success(_("started a new conversation"))
        elif name == "/system":
            self.start(argument)
            console.success(_("started a new conversation with this system message"))
        elif name == "/tool":
            if self.open_calls:
                self.read(argument)
            else:
                console.info(_("no tool was called"))
        elif name == "/retry":
            self._retry()
        elif name == "/save":
            self._save(Path(argument or "chat.json"))
        elif name == "/thinking":
            print(visible(self.thought or _("the last answer has no thinking")))
        elif name == "/set":
            self._set(argument)
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
        """Write the conversation to a new file, or to the one that it was saved to before."""
        text = artifact.as_json({"messages": self.messages, **({"tools": self.tools} if self.tools else {})})
        try:
            if file in self.saved and file.is_file() and artifact.hash_file(file) == self.saved[file]:
                artifact.write_text(file, text)
            else:
                originals.write_new(file, text)
            self.saved[file] = artifact.hash_file(file)
        except (OSError, ValueError) as error:  # a NUL in the name is a ValueError
            console.error(f"{file}: {error}")
        except TongwenError as error:
            console.error(error.text())
        else:
            console.success(str(file))

    def _set(self, argument: str) -> None:
        """Change a setting (`temperature 0.7`) and print all settings."""
        name, _unused, value = argument.partition(" ")
        if name:
            try:
                changed = self.settings | {name: _read_number(name, value)}
                self.check(changed)
            except TongwenError as error:
                console.error(error.text())
                return
            self.settings = changed
        console.info("  ".join(f"{name} {value}" for name, value in self.settings.items()))


def converse(chat: TerminalChat, *, name: str, system: str) -> int:
    """Read and answer lines until the user leaves. Returns the exit code."""
    console.header(name, _("/help for commands, Ctrl-D to leave"))
    chat.start(system)
    read = _reader()
    while True:
        try:
            line = read().strip()
        except EOFError:
            return 0
        except StopSignal:
            raise
        except KeyboardInterrupt:
            continue
        if line.startswith("/"):
            if not chat.command(line):
                return 0
        elif line:
            chat.read(line)


class _AnswerDisplay:
    """Prints an answer piece by piece or at its end, and its thinking as one grey line with a counter."""

    def __init__(self, stream: bool) -> None:
        self.stream, self.stopped = stream, False
        self.buffer, self.thought = "", 0

    def add(self, part: StreamPart) -> None:
        if part.thinking:
            self.thought += len(part.text)
            if sys.stdout.isatty():
                self._grey("\r")
            return
        text = f"\n→ {part.call.name} {part.call.arguments}" if part.call else part.text
        if text and self.thought:
            self._unfold()
        if self.stream:
            print(visible(text), end="", flush=True)
        else:
            self.buffer += text

    def close(self) -> None:
        if self.thought:
            self._unfold()
        print(visible(self.buffer) + (_(" …stopped") if self.stopped else ""))

    def _unfold(self) -> None:
        self._grey("\r" if sys.stdout.isatty() else "")
        print()
        self.thought = 0

    def _grey(self, start: str) -> None:
        text = _("thinking, {thought} characters (/thinking shows it)").format(thought=self.thought)
        print(f"{start}\x1b[2m{text}\x1b[0m" if start else text, end="", flush=True)


def _reader() -> Callable[[], str]:
    """Return the function that reads a question; in a terminal, Python's line editor, which knows how wide characters are."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")
    if not sys.stdin.isatty():
        return input
    with suppress(ImportError):  # on Windows the console itself edits the line
        import readline

        readline.parse_and_bind("set enable-bracketed-paste on")  # several pasted lines are one question
    prompt = _("\nyou › ")
    return lambda: input(prompt)


def _read_number(name: str, value: str) -> Any:
    try:
        number = json.loads(value)
    except (ValueError, RecursionError):
        number = None
    if isinstance(number, (int, float)) and not isinstance(number, bool):
        return number
    raise RecipeError(
        _("{value!r} is not a number").format(value=value), place=f"/set {name}", remedy="/set temperature 0.7"
    )
