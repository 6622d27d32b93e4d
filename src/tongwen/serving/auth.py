"""Access control and timeouts in front of the routes of a server on this machine.

A page of any site can send requests to 127.0.0.1, even under a host name of its own (DNS rebinding), so the host and the
origin are checked first, then the token.
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
from typing import Any

import uvicorn
from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from uvicorn.protocols.http.h11_impl import H11Protocol

from tongwen.core import malloc
from tongwen.core.errors import MachineError, RecipeError
from tongwen.core.i18n import _
from tongwen.core.stop_signals import StopSignal, on_stop_signals

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

TOKEN = "TONGWEN_API_KEY"  # noqa: S105 (the name of the variable)
MIN_TOKEN_LENGTH = 16  # characters of a token that the user chose
REQUEST_SECONDS = 20  # a complete request must arrive within this time
ARENAS = 2
MMAP_BYTES = 1 << 20  # glibc maps larger blocks on their own (with a threshold of 128 KiB, answers take a third longer)
DRAIN_SECONDS = 30  # for answers in progress when the server has to stop


def error_response(status: int, kind: str, message: str, **headers: str) -> JSONResponse:
    """Return an error in the format of OpenAI's API."""
    error = {"message": message, "type": kind, "param": None, "code": kind}
    return JSONResponse({"error": error}, status, {name.replace("_", "-"): value for name, value in headers.items()})


def is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def choose_token(loopback: bool) -> tuple[str, bool]:
    """Return the token and whether it was generated here. Raises RecipeError if the server listens beyond loopback and the
    user has chosen no token: opening a model to other machines must be deliberate."""
    token = os.environ.get(TOKEN, "")
    if not token and loopback:
        return secrets.token_urlsafe(24), True
    if len(token) < MIN_TOKEN_LENGTH:
        raise RecipeError(
            _("the token must have at least {shortest} characters; this one has {count}").format(
                shortest=MIN_TOKEN_LENGTH, count=len(token)
            ),
            place=f"${TOKEN}",
            remedy=f"export {TOKEN}=$(openssl rand -hex 24)",
        )
    return token, False


class AuthMiddleware:
    """Passes a request on to `app` if its host, origin and bearer token are right."""

    def __init__(self, app: App, token: str, *, loopback: bool) -> None:
        self.app, self.loopback = app, loopback
        self.token = digest(token)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        rejection = self._reject(Headers(scope=scope)) if scope["type"] == "http" else None
        await (rejection or self.app)(scope, receive, send)

    def _reject(self, headers: Headers) -> JSONResponse | None:
        host, origin = headers.get("host", ""), headers.get("origin")
        if self.loopback and not is_loopback(host.rpartition(":")[0] or host):
            return error_response(403, "host_refused", _("this server only answers requests to 127.0.0.1"))
        if origin is not None and origin != f"http://{host}":
            return error_response(403, "origin_refused", _("pages of other sites may not send requests here"))
        scheme, _unused, token = headers.get("authorization", "").partition(" ")
        if not hmac.compare_digest(digest(token), self.token) or scheme.lower() != "bearer":
            return error_response(
                401,
                "invalid_api_key",
                _("the token is missing or wrong"),
                www_authenticate="Bearer",
            )
        return None


def digest(token: str) -> bytes:
    """Return the token's SHA-256: digests have one length, so the time of a comparison reveals nothing."""
    return hashlib.sha256(token.encode("utf-8", "surrogateescape")).digest()


class TimeoutProtocol(H11Protocol):
    """Closes a connection if the headers of a request take too long."""

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
    """Return a listening socket; port 0 picks a free port. Raises MachineError if the address cannot be used."""
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
    """Let all threads share a few heaps, and map large tensors outside of them.

    By default glibc gives each of a server's many threads its own heap, which never shrinks below the peak of one answer.
    The hole that a large tensor leaves is too small for the next one, which is a token longer: after 2,000 questions to a
    tiny model, 200 MB of such holes lay among 230 MB in use.
    """
    malloc.set_parameters(
        {malloc.ARENA_MAX: ARENAS, malloc.MMAP_THRESHOLD: MMAP_BYTES, malloc.TRIM_THRESHOLD: 4 * MMAP_BYTES}
    )


def freeze_objects() -> None:
    """Exclude all present objects from garbage collection. Half a million objects exist when a server starts; scanning them
    would stop every answer for a fifth of a second at each full collection."""
    gc.collect()
    gc.freeze()


def serve(app: App, listening: socket.socket) -> None:
    """Serve until SIGTERM or Ctrl-C; then accept no new requests and finish the answers in progress."""
    share_heaps()
    freeze_objects()

    async def ending(scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await app(scope, receive, send)
        except asyncio.CancelledError:  # an answer that took longer than DRAIN_SECONDS
            if not server.should_exit:
                raise

    config = uvicorn.Config(
        ending,
        http=TimeoutProtocol,
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=DRAIN_SECONDS,
    )
    server = uvicorn.Server(config)
    received: list[int] = []

    def end(number: int, frame: object = None) -> None:
        received.append(number)
        server.should_exit = True

    # uvicorn handles SIGTERM and SIGINT while it runs, and raises them again afterwards: they end here.
    before = signal.signal(signal.SIGINT, end)
    try:
        with on_stop_signals(end):
            server.run(sockets=[listening])
    finally:
        signal.signal(signal.SIGINT, before)
    if received and received[0] not in (signal.SIGINT, signal.SIGTERM):
        raise StopSignal(received[0])
