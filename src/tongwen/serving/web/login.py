"""Access control in front of the page.

A page on loopback is open to every other page in the same browser and to every user of the machine. So a request must
name this server as its host (DNS rebinding), come from this page if it changes anything (foreign origins), and carry the
token; its body has a limit. Responses may load and run nothing from elsewhere.
"""

from __future__ import annotations

import asyncio
import hmac
import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import parse_qs

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import HTMLResponse, PlainTextResponse, RedirectResponse, Response
from starlette.types import Message

from tongwen.core.html import render
from tongwen.core.i18n import _
from tongwen.serving.auth import REQUEST_SECONDS, App, Receive, Scope, Send, digest, is_loopback

UPLOAD = re.compile(r"/(en|zh)/api/upload")
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; "
    "connect-src 'self'; frame-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "content-security-policy": POLICY,
    "cache-control": "no-store",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
}


@dataclass(frozen=True)
class UploadLimits:
    """Maximum bytes of a request's body, of an uploaded file, and of all uploaded files."""

    body: int = 1 << 20
    upload: int = 200 << 20
    uploads: int = 2 << 30


class LoginMiddleware:
    """Checks every request before the application gets it.

    loopback: accept only host names of this machine; uploads: the folder of uploaded files, without links; None: no uploads.
    """

    def __init__(
        self, app: App, token: str, *, port: int, loopback: bool, limits: UploadLimits, uploads: Path | None
    ) -> None:
        self.app, self.loopback, self.limits, self.uploads = app, loopback, limits, uploads
        self.token = digest(token)
        self.cookie = f"tongwen_{port}"  # cookies are shared by all ports of a host

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        answer = self._answer(scope, Headers(scope=scope))
        if answer is None and scope["method"] not in ("GET", "HEAD") and not UPLOAD.fullmatch(scope["path"]):
            answer, receive = await self._read_all(receive)
        await (answer or self.app)(scope, receive, _secured(send))

    async def _read_all(self, receive: Receive) -> tuple[Response | None, Receive]:
        """Read a body, and return the response that refuses it, and a `receive` that gives it once more."""
        try:
            body = await asyncio.wait_for(_read(receive, self.limits.body), REQUEST_SECONDS)
        except asyncio.TimeoutError:
            return PlainTextResponse("too slow\n", 408), receive
        if len(body) > self.limits.body:
            return PlainTextResponse(f"at most {self.limits.body} bytes\n", 413), receive
        first: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive_again() -> Message:
            return first.pop() if first else await receive()

        return None, receive_again

    def _answer(self, scope: Scope, headers: Headers) -> Response | None:
        """Return the response to a refused request or a login; None lets the request pass."""
        host, origin, writes = headers.get("host", ""), headers.get("origin"), scope["method"] not in ("GET", "HEAD")
        if self.loopback and not is_loopback(host.rpartition(":")[0] or host):
            return PlainTextResponse("this name is not served here\n", 403)
        if (origin is not None or writes) and origin != f"http://{host}":
            return PlainTextResponse("another page may not ask here\n", 403)
        query_token = parse_qs(scope["query_string"].decode("latin-1")).get("token", [""])[0]
        if scope["method"] == "GET" and query_token and self._is_right(query_token):
            return self._welcome(scope["path"], query_token)
        if not self._is_right(self._token_of(headers)):
            return _login_page()
        return self._check_size(scope["path"], headers) if writes else None

    def _token_of(self, headers: Headers) -> str:
        scheme, _unused, bearer = headers.get("authorization", "").partition(" ")
        if scheme.lower() == "bearer":
            return bearer
        cookies = (part.strip().partition("=") for part in headers.get("cookie", "").split(";"))
        return next((value for name, _, value in cookies if name == self.cookie), "")

    def _is_right(self, token: str) -> bool:
        return hmac.compare_digest(digest(token), self.token)

    def _welcome(self, path: str, token: str) -> Response:
        """Move the token from the address, which browsers show and remember, into a cookie."""
        target = path if re.fullmatch(r"/(en|zh)/", path) else "/"
        response = RedirectResponse(target, 303)
        response.set_cookie(self.cookie, token, httponly=True, samesite="strict", path="/")
        return response

    def _check_size(self, path: str, headers: Headers) -> Response | None:
        length, uploads = headers.get("content-length", ""), bool(UPLOAD.fullmatch(path))
        # With both headers, the chunks count: a body of any length would follow.
        if not re.fullmatch("[0-9]{1,15}", length) or "transfer-encoding" in headers:
            return PlainTextResponse("how long is it?\n", 411)
        limit = self.limits.upload if uploads else self.limits.body
        if int(length) > limit:
            return PlainTextResponse(f"at most {limit} bytes\n", 413)
        if not uploads:
            return None
        if self.uploads is None:
            return PlainTextResponse("there is nothing here\n", 404)
        kept = sum(file.stat().st_size for file in self.uploads.rglob("*") if file.is_file())
        if kept + int(length) > self.limits.uploads:
            return PlainTextResponse("too many files: restart the server\n", 413)
        return None


async def _read(receive: Receive, limit: int) -> bytes:
    """Read a request's body, or so much of it that it is larger than the limit."""
    body, more = bytearray(), True
    while more and len(body) <= limit:
        message = await receive()
        body.extend(message.get("body", b""))
        more = message.get("more_body", False)
    return bytes(body)


def _secured(send: Send) -> Send:
    """Return a `send` that adds the security headers to a response, where it has none of its own."""

    async def send_secured(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(raw=message["headers"])
            for name, value in HEADERS.items():
                headers.setdefault(name, value)
        await send(message)

    return send_secured


def _login_page() -> Response:
    text = _("Open the address that the terminal shows: it ends in ?token=…")
    return HTMLResponse(render("serving/web/login.html.jinja", text=text), 401, {"www-authenticate": "Bearer"})
