"""Who may come in, and how long one may dawdle: what stands before the routes of a server on this machine.

A page of any site can send requests to 127.0.0.1, also under a name of its own (DNS rebinding), so the host and the
origin are looked at first, then the token.
"""

from __future__ import annotations

import asyncio
import gc
import hashlib
import hmac
import ipaddress
import os
import secrets
import signal
import socket
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, Literal

import uvicorn
from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from uvicorn.protocols.http.h11_impl import H11Protocol

from tongwen.core import malloc
from tongwen.core.errors import MachineError, RecipeError
from tongwen.core.i18n import _

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

TOKEN = "TONGWEN_API_KEY"  # noqa: S105 (the name of the variable)
SHORTEST = 16  # characters of a token that somebody chose
REQUEST_SECONDS = 20  # a request must have come in whole
ARENAS = 2
LARGE = 1 << 20  # bytes, from which on a tensor is mapped by itself (from 128 KiB on, answers take a third longer)
DRAIN_SECONDS = 30  # for the answers that are being given when the server is told to end


def refusal(status: int, kind: str, message: str, **headers: str) -> JSONResponse:
    """An error as OpenAI's clients read it."""
    error = {"message": message, "type": kind, "param": None, "code": kind}
    return JSONResponse({"error": error}, status, {name.replace("_", "-"): value for name, value in headers.items()})


def is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def choose_token(loopback: bool) -> tuple[str, bool]:
    """The token, and whether it was made here. Raises RecipeError where one must be chosen: who opens a model to other
    machines does it knowingly."""
    token = os.environ.get(TOKEN, "")
    if not token and loopback:
        return secrets.token_urlsafe(24), True
    if len(token) < SHORTEST:
        raise RecipeError(
            _("the token must have at least {shortest} characters; this one has {count}").format(
                shortest=SHORTEST, count=len(token)
            ),
            place=f"${TOKEN}",
            remedy=f"export {TOKEN}=$(openssl rand -hex 24)",
        )
    return token, False


class AuthMiddleware:
    """Lets a request through to `app` when its host, its origin and its bearer token are right."""

    def __init__(self, app: App, token: str, *, loopback: bool) -> None:
        self.app, self.loopback = app, loopback
        self.token = digest(token)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        refused = self._refused(Headers(scope=scope)) if scope["type"] == "http" else None
        await (refused or self.app)(scope, receive, send)

    def _refused(self, headers: Headers) -> JSONResponse | None:
        host, origin = headers.get("host", ""), headers.get("origin")
        if self.loopback and not is_loopback(host.rpartition(":")[0] or host):
            return refusal(403, "host_refused", _("this server only answers requests to 127.0.0.1"))
        if origin is not None and origin != f"http://{host}":
            return refusal(403, "origin_refused", _("pages of other sites may not send requests here"))
        scheme, _unused, token = headers.get("authorization", "").partition(" ")
        if not hmac.compare_digest(digest(token), self.token) or scheme.lower() != "bearer":
            return refusal(
                401,
                "invalid_api_key",
                _("the token is missing or wrong"),
                www_authenticate="Bearer",
            )
        return None


def digest(token: str) -> bytes:
    """Tokens are compared by digests of one length, so that the time tells nothing."""
    return hashlib.sha256(token.encode("utf-8", "surrogateescape")).digest()


class TimeoutProtocol(H11Protocol):
    """A connection that is closed when the head of a request takes too long."""

    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def _watch(self) -> None:
        reading = self.cycle is None or self.cycle.response_complete
        if reading and self._deadline is None:
            self._deadline = self.loop.call_later(REQUEST_SECONDS, self.transport.close)
        elif not reading and self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None


def open_port(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes a free one. Raises MachineError when it cannot be had."""
    try:
        family, *_unused, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen()
    except OSError as error:
        raise MachineError(
            _("cannot use this address: {strerror}").format(strerror=error.strerror),
            place=f"{host}:{port}",
            remedy="--port 0",
        ) from None
    return listening


def share_heaps() -> None:
    """Have all threads allocate from the same few heaps, and large tensors from none. glibc gives each of a server's many
    threads a heap of its own, which keeps what the largest answer needed; and where a large tensor was, the next one, a token
    longer, finds no room: 200 MB of such holes among 230 in use, after 2,000 questions to a model of no size."""
    malloc.set_parameters({malloc.ARENA_MAX: ARENAS, malloc.MMAP_THRESHOLD: LARGE, malloc.TRIM_THRESHOLD: 4 * LARGE})


def settle() -> None:
    """Have Python never look again through what is there when a server begins: half a million objects stop every answer for a
    fifth of a second, each time that what visitors left in cycles is collected."""
    gc.collect()
    gc.freeze()


def serve(app: App, listening: socket.socket, *, lifespan: Literal["on", "off"] = "off") -> None:
    """Serve until SIGTERM or Ctrl-C: then nobody new is let in, and what is being answered may end."""
    share_heaps()
    settle()
    config = uvicorn.Config(
        app,
        http=TimeoutProtocol,
        ws="none",
        lifespan=lifespan,
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=DRAIN_SECONDS,
    )
    # uvicorn raises the signal once more when it has ended; that it has ended is enough.
    before = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        uvicorn.Server(config).run(sockets=[listening])
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
