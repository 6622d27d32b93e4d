"""Serve the page on a port of this machine: two languages behind one login, for as long as the command runs."""

from __future__ import annotations

import os
from contextlib import suppress
from typing import Any

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when Gradio is imported

import gradio as gr
from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, PlainTextResponse, RedirectResponse, Response

from tongwen.core import console
from tongwen.core.errors import TongwenError
from tongwen.core.i18n import _, language
from tongwen.serving import auth
from tongwen.serving.auth import TOKEN, choose_token, is_loopback, open_port
from tongwen.serving.web.backend import PageBackend
from tongwen.serving.web.login import ENDLESS, LoginMiddleware, UploadLimits
from tongwen.serving.web.page import make_page, theme_and_css

LANGUAGES = ("en", "zh")
WAITING = 16  # requests that may wait; further ones are refused
SESSIONS = 64  # open pages whose state is kept; Gradio would keep 10,000, each with 0.2 MB and its conversation
ICON = (
    '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 32 32"><rect width="32" height="32" rx="7" fill="#0f766e"/>'
    '<text x="16" y="23" fill="white" font-size="19" text-anchor="middle">同</text></svg>'
)
REPORT = {  # a separate page without scripts; browsers refuse a sandbox with an opener policy
    "content-security-policy": "sandbox; default-src 'none'; style-src 'unsafe-inline'; img-src data:; frame-ancestors 'self'",
    "cross-origin-opener-policy": "unsafe-none",
}


def serve(backend: PageBackend, host: str, port: int) -> int:
    """Serve until interrupted. Raises RecipeError if other machines can reach the address and the user has chosen no token,
    MachineError if the port cannot be used."""
    loopback = is_loopback(host)
    token, generated = choose_token(loopback)
    with open_port(host, port) as listening:
        port = listening.getsockname()[1]
        app = make_app(backend, token, port=port, loopback=loopback)
        url = f"http://{host}:{port}/" + (f"?token={token}" if generated else "")
        console.success(url if generated else _("{url}?token=…: the token is ${token}").format(url=url, token=TOKEN))
        console.info(_("Ctrl-C stops it; runs that have started continue"))
        console.emit({"url": url})
        auth.serve(app, listening, lifespan="on", endless=ENDLESS)
    return 0


def make_app(
    backend: PageBackend, token: str, *, port: int, loopback: bool = True, limits: UploadLimits | None = None
) -> Any:
    """Return the whole application: pages, reports, login."""
    limits = limits or UploadLimits()
    if backend.uploads:
        os.environ["GRADIO_TEMP_DIR"] = str(backend.uploads)
    application = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)

    @application.get("/")
    def choose(request: Request) -> Response:
        languages = request.headers.get("accept-language", language())
        return RedirectResponse("/zh/" if languages.lower().startswith("zh") else "/en/", 303)

    @application.get("/favicon.ico")
    def icon() -> Response:
        return Response(ICON, media_type="image/svg+xml")

    @application.get("/report")
    def report(name: str) -> Response:
        with suppress(TongwenError, OSError):
            if backend.runs:
                return HTMLResponse(backend.runs.report(name).read_bytes(), headers=REPORT)
        return PlainTextResponse("there is nothing here\n", 404)

    for name in LANGUAGES:
        page = make_page(backend, name)
        page.queue(
            max_size=WAITING, default_concurrency_limit=WAITING, api_open=False
        )  # the API cannot bypass the queue
        page.state_session_capacity = SESSIONS
        gr.mount_gradio_app(
            application,
            page,
            path=f"/{name}",
            footer_links=[],
            run_history=False,
            allowed_paths=[],
            blocked_paths=["/"],
            show_error=True,
            max_file_size=limits.upload,
            ssr_mode=False,
            enable_monitoring=False,
            pwa=False,
            mcp_server=False,
            **theme_and_css(),
        )
    return LoginMiddleware(application, token, port=port, loopback=loopback, limits=limits, uploads=backend.uploads)
