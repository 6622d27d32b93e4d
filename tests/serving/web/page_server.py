"""The page on a real port with a scripted model: for the tests of the gate and of the browser."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import httpx
import uvicorn

from tongwen.core.errors import NumbersError
from tongwen.serving.web.backend import ChatBackend, PageBackend
from tongwen.serving.web.login import UploadLimits
from tongwen.serving.web.server import make_app

TOKEN = "right-token"
SECRET = "canary/of/a/path"


class Parrot:
    """Repeats the question, character by character; some words make it fail. requests: what reached it; closed: how many
    answers were given up before their end."""

    def __init__(self) -> None:
        self.requests: list[list[dict[str, Any]]] = []
        self.closed = 0
        self.pause = 0.0

    def reply(self, name: str, messages: list[dict[str, Any]], options: dict[str, Any]) -> Iterator[str]:
        self.requests.append(messages)
        text = messages[-1]["content"]
        if "OOM" in text:
            raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")
        if "BUG" in text:
            raise KeyError(SECRET)
        try:
            for place, character in enumerate(text):
                if "NAN" in text and place > 2:
                    raise NumbersError("the model gives NaN logits", place="generate", remedy="precision: fp32")
                time.sleep(self.pause)
                yield character
        except GeneratorExit:
            self.closed += 1
            raise


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


@contextmanager
def serving(backend: PageBackend, limits: UploadLimits | None = None) -> Iterator[str]:
    """The address of a running page."""
    port = free_port()
    app = make_app(backend, TOKEN, port=port, limits=limits)
    # uvicorn's own logging would have all handlers closed that this process has, and absl's closes the stream under it.
    server = uvicorn.Server(uvicorn.Config(app, port=port, log_config=None, access_log=False))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    ends = time.monotonic() + 60
    while not server.started and time.monotonic() < ends:
        time.sleep(0.05)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join(10)


def make_chat_backend(parrot: Parrot, *chosen: str) -> ChatBackend:
    return ChatBackend(lambda: list(chosen), chosen, lambda name, messages, options: messages[-9:], parrot.reply)


def client(address: str, token: str = TOKEN, **headers: str) -> httpx.Client:
    bearer = {"authorization": f"Bearer {token}"} if token else {}
    return httpx.Client(base_url=address, headers={**bearer, "origin": address, **headers}, timeout=30)


def ask(
    address: str, text: str, language: str = "en", history: Sequence[dict[str, Any]] = (), model: str = "parrot"
) -> dict[str, Any]:
    """The answer to a question, sent as the browser sends it: text, problem and pace."""
    with client(address) as web:
        return call(web, language, [*history, {"role": "user", "content": text}], model)


def call(web: httpx.Client, language: str, messages: list[dict[str, Any]], model: str) -> dict[str, Any]:
    body = {"model": model, "system": "", "messages": messages, "sampling": {}}
    shown: dict[str, Any] = {"text": ""}
    with web.stream("POST", f"/{language}/api/chat", json=body) as events:
        assert events.status_code == 200, events.read()
        for line in events.iter_lines():
            event = json.loads(line[6:]) if line.startswith("data: ") else {}
            shown["text"] += event.pop("text", "")
            shown.update(event)
    return shown
