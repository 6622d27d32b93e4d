"""A conversation in the terminal: streamed, several turns, Ctrl-C stops an answer and Ctrl-D leaves."""

from __future__ import annotations

import importlib
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from tongwen import console
from tongwen.errors import TongwenError
from tongwen.language import say

Messages = list[dict[str, Any]]


def converse(
    reply: Callable[[Messages], Iterator[str]],
    *,
    name: str,
    system: str,
    count: Callable[[Messages], int],
    context: int,
) -> int:
    """Read a line, stream the answer, remember both. count: tokens of a conversation; context: how many fit."""
    with suppress(ImportError):  # line editing, also for wide characters, where the platform has it
        importlib.import_module("readline")
    console.header(name, say("/help for commands, Ctrl-D to leave", "/help 查看命令，Ctrl-D 离开"))
    messages: Messages = _start(system)
    while True:
        try:
            line = input(say("\nyou › ", "\n你 › ") if sys.stdin.isatty() else "").strip()
        except EOFError:
            return 0
        except KeyboardInterrupt:
            print()
            continue
        if not line:
            continue
        if line.startswith("/"):
            after = _command(line, messages)
            if after is None:
                return 0
            messages = after
            if not (line == "/retry" and messages and messages[-1]["role"] == "user"):
                continue
        else:
            messages.append({"role": "user", "content": line})
        _cut_to_fit(messages, count, context)
        answer = _show(reply(list(messages)))
        if answer is None:
            messages.pop()
        else:
            messages.append({"role": "assistant", "content": answer})


def _show(pieces: Iterator[str]) -> str | None:
    """Print the pieces as they come; returns the whole, or None when the model could not answer."""
    began = time.monotonic()
    text = ""
    try:
        for piece in pieces:
            print(piece, end="", flush=True)
            text += piece
    except KeyboardInterrupt:
        pieces.close()  # type: ignore[attr-defined]
        print(say(" …stopped", " …已停止"), end="")
    except TongwenError as error:
        console.error(error.text())
        return None
    seconds = max(time.monotonic() - began, 1e-9)
    print()
    if sys.stdout.isatty():
        console.SCREEN.console.print(f"[dim]{len(text) / seconds:.0f} {say('characters/s', '字/秒')}[/]")
    return text


def _cut_to_fit(messages: Messages, count: Callable[[Messages], int], context: int) -> None:
    """Drop the oldest whole turns until the conversation fits; the system message stays."""
    first = 1 if messages and messages[0]["role"] == "system" else 0
    dropped = 0
    while len(messages) - first > 2 and count(messages) > context:
        del messages[first : first + 2]
        dropped += 1
    if dropped:
        console.notice(
            say(
                f"{dropped} of the oldest turns no longer fit and are forgotten",
                f"最早的 {dropped} 轮已超出长度，不再记得",
            )
        )


def _start(system: str) -> Messages:
    return [{"role": "system", "content": system}] if system else []


def _command(line: str, messages: Messages) -> Messages | None:
    """The conversation after a command; None to leave."""
    word, _, rest = line.partition(" ")
    if word in ("/exit", "/quit", "/stop"):
        return None
    if word == "/clear":
        console.good(say("a new conversation", "已开始新对话"))
        return messages[:1] if messages and messages[0]["role"] == "system" else []
    if word == "/system":
        console.good(say("a new conversation with this system message", "已按新的系统提示开始新对话"))
        return _start(rest.strip())
    if word == "/retry":
        while messages and messages[-1]["role"] == "assistant":
            messages = messages[:-1]
        return messages
    if word == "/save":
        file = Path(rest.strip() or "chat.json")
        file.write_text(json.dumps({"messages": messages}, ensure_ascii=False, indent=1), encoding="utf-8")
        console.good(str(file))
        return messages
    console.tell(
        say(
            "/clear  /system TEXT  /retry  /save FILE  /exit",
            "/clear 清空  /system 文字  /retry 重答  /save 文件  /exit 离开",
        )
    )
    return messages
