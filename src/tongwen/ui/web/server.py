"""The page on a port of this machine: two languages behind one gate, for as long as the command runs."""

from __future__ import annotations

import os
import secrets
import tempfile
from contextlib import ExitStack
from typing import Any

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when Gradio is imported

import gradio as gr
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, PlainTextResponse, RedirectResponse, Response

from tongwen import console
from tongwen.errors import MachineError, RecipeError, TongwenError
from tongwen.language import language, say
from tongwen.ui.web.bench import Bench
from tongwen.ui.web.gate import Gate, Limits
from tongwen.ui.web.page import look, make_page

LANGUAGES = ("en", "zh")
AT_ONCE, WAITING = 2, 16  # answers that are given at the same time, and requests that may wait
ICON = (
    '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 32 32"><rect width="32" height="32" rx="7" fill="#0f766e"/>'
    '<text x="16" y="23" fill="white" font-size="19" text-anchor="middle">同</text></svg>'
)
# A report is a page of its own, of which nothing may run.
REPORT_POLICY = "sandbox; default-src 'none'; style-src 'unsafe-inline'; img-src data:; frame-ancestors 'self'"


def serve(bench: Bench, host: str, port: int, token: str) -> int:
    """Serve until interrupted. token: "" makes one. Raises RecipeError for an address that others reach without a token of
    the user's own choice, MachineError when the port is taken."""
    if host not in ("127.0.0.1", "localhost", "::1") and not token:
        raise RecipeError(
            say(f"{host} can be reached from other machines", f"{host} 可以被其他机器访问"),
            place="--host",
            remedy=say("choose a token: --token …", "请指定令牌：--token …"),
        )
    token = token or secrets.token_urlsafe(18)
    with ExitStack() as stack:
        os.environ["GRADIO_TEMP_DIR"] = stack.enter_context(tempfile.TemporaryDirectory(prefix="tongwen-web-"))
        app = make_app(bench, host, port, token)
        console.good(f"http://{host}:{port}/?token={token}")
        console.tell(say("Ctrl-C ends it; runs that were started go on", "Ctrl-C 结束；已启动的训练会继续"))
        try:
            uvicorn.run(app, host=host, port=port, log_level="warning", access_log=False, timeout_graceful_shutdown=5)
        except SystemExit:
            raise MachineError(
                say(f"port {port} of {host} cannot be used", f"{host} 的端口 {port} 无法使用"), remedy="--port 7861"
            ) from None
    return 0


def make_app(bench: Bench, host: str, port: int, token: str, limits: Limits | None = None) -> Any:
    """The whole application: pages, reports, gate."""
    limits = limits or Limits()
    inside = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)

    @inside.get("/")
    def choose(request: Request) -> Response:
        wanted = request.headers.get("accept-language", language())
        return RedirectResponse("/zh/" if wanted.lower().startswith("zh") else "/en/", 303)

    @inside.get("/favicon.ico")
    def icon() -> Response:
        return Response(ICON, media_type="image/svg+xml")

    @inside.get("/report")
    def report(name: str) -> Response:
        try:
            assert bench.runs
            file = bench.runs.report(name)
            return HTMLResponse(file.read_bytes(), headers={"content-security-policy": REPORT_POLICY})
        except (TongwenError, OSError, ValueError, AssertionError):
            return PlainTextResponse("there is nothing here\n", 404)

    for name in LANGUAGES:
        page = make_page(bench, name)
        page.queue(max_size=WAITING, default_concurrency_limit=WAITING)
        gr.mount_gradio_app(
            inside,
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
            **look(),
        )
    hosts = frozenset(f"{one}:{port}" for one in {host, "127.0.0.1", "localhost"})
    return Gate(inside, token=token, hosts=hosts, limits=limits)
