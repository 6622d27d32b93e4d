"""The routes of the page. `routes` lists all of them; what is not listed is answered with 404.

A path from a visitor is a string that only the callables of the `PageBackend` interpret.
"""

from __future__ import annotations

import asyncio
import json
import secrets
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, PlainTextResponse, RedirectResponse, Response
from starlette.routing import Route

from tongwen.core.errors import TongwenError
from tongwen.core.html import render
from tongwen.core.i18n import _, language, use_language
from tongwen.serving.web import posted
from tongwen.serving.web.answers import Answers
from tongwen.serving.web.backend import PageBackend
from tongwen.serving.web.conversation import StreamedAnswer
from tongwen.serving.web.explain import explain
from tongwen.serving.web.presets import PRESETS
from tongwen.serving.web.run_view import as_html
from tongwen.serving.web.texts import texts

LANGUAGES = {"en": "English", "zh": "中文"}
EXAMPLE = "人工智能正在改变我们学习语言的方式。月亮自己不会发光，它反射太阳的光。"
STATIC = Path(__file__).parent / "static"
TYPES = {"js": "text/javascript", "css": "text/css", "svg": "image/svg+xml"}
SUFFIX = 16  # characters of an uploaded file's ending that are kept
REPORT = {  # a separate page without scripts; browsers refuse a sandbox with an opener policy
    "content-security-policy": "sandbox; default-src 'none'; style-src 'unsafe-inline'; img-src data:; frame-ancestors 'self'",
    "cross-origin-opener-policy": "unsafe-none",
}
Body = TypeVar("Body", bound=posted.Posted)
Handler = Callable[[Request], Awaitable[Response]]


def routes(backend: PageBackend) -> list[Route]:
    """Return every route of the page."""
    listed = [
        Route("/", choose_language),
        Route("/favicon.ico", static_file("icon.svg")),
        *(Route(f"/static/{file.name}", static_file(file.name)) for file in sorted(STATIC.glob("*.*s"))),
    ]
    if backend.runs:
        listed.append(Route("/report", Pages(backend, "en").report))
    for name in LANGUAGES:
        listed += Pages(backend, name).routes()
    return listed


async def choose_language(request: Request) -> Response:
    wanted = request.headers.get("accept-language", language())
    return RedirectResponse("/zh/" if wanted.lower().startswith("zh") else "/en/", 303)


def static_file(name: str) -> Handler:
    content, kind = (STATIC / name).read_bytes(), TYPES[name.rpartition(".")[2]]
    if name == "studio.css":  # tables, cards and curves look as they do in reports
        content = f".ours{{{render('core/parts.css')}}}\n".encode() + content

    async def send(request: Request) -> Response:
        return Response(content, media_type=kind)

    return send


@dataclass(frozen=True)
class Pages:
    """The routes of one language."""

    backend: PageBackend
    language: str

    def routes(self) -> list[Route]:
        backend, answers = self.backend, Answers(self.language)

        async def chat(request: Request) -> Response:
            return await self._chat(request, answers)

        found = [
            Route(f"/{self.language}/", self.page),
            self._get("state", lambda _query: self._state()),
            Route(f"/{self.language}/api/chat", chat, methods=["POST"]),
        ]
        if data := backend.data:
            if backend.uploads:
                found.append(Route(f"/{self.language}/api/upload", self.upload, methods=["POST"]))
            found.append(
                self._post(
                    "inspect",
                    posted.Inspection,
                    lambda one: dict(
                        zip(("rows", "samples"), data.inspect(one.file, one.model, one.template), strict=True)
                    ),
                )
            )
        if vocabulary := backend.vocabulary:
            found.append(
                self._post(
                    "vocabulary",
                    posted.Comparison,
                    lambda one: dict(
                        zip(("tokens", "report"), vocabulary.compare(one.base, one.other, one.text), strict=True)
                    ),
                )
            )
        if runs := backend.runs:
            found += [
                self._get("recipe", lambda query: {"text": runs.read(query.get("name", ""))}),
                self._get("run", lambda query: self._run(query.get("name", ""))),
                self._post("start", posted.Start, lambda one: {"run": runs.start(one.recipe, one.changes)}),
                self._post("stop", posted.OneRun, lambda one: runs.stop(one.run)),
                self._post("resume", posted.OneRun, lambda one: runs.resume(one.run)),
                self._post("compare", posted.SeveralRuns, lambda one: {"report": str(runs.compare(one.runs))}),
            ]
        return found

    async def page(self, request: Request) -> Response:
        with use_language(self.language):
            return HTMLResponse(render("serving/web/page.html.jinja", title=self.backend.title))

    async def report(self, request: Request) -> Response:
        with suppress(TongwenError, OSError):
            if self.backend.runs:
                name = request.query_params.get("name", "")
                return HTMLResponse(self.backend.runs.report(name).read_bytes(), headers=REPORT)
        return PlainTextResponse("there is nothing here\n", 404)

    async def upload(self, request: Request) -> Response:
        """Keep the body as a file. Of its name only the ending is kept."""
        assert self.backend.uploads
        ending = "".join(Path(request.query_params.get("name", "").replace("\0", "")).suffixes)[-SUFFIX:]
        kept = ending if all(letter.isalnum() or letter == "." for letter in ending) else ""
        file = self.backend.uploads / (secrets.token_hex(8) + kept)
        try:
            with file.open("xb") as stream:
                async for piece in request.stream():
                    await asyncio.to_thread(stream.write, piece)
        except ClientDisconnect:
            file.unlink()
            return Response(status_code=400)
        return as_json({"file": str(file)})

    async def _chat(self, request: Request, answers: Answers) -> Response:
        with use_language(self.language):
            try:
                question = await _body(request, posted.Question)
            except ValidationError as error:
                return _refused(error)
            if answers.full:
                return as_json({"problem": _("too many questions are waiting; ask again later")}, 503)
        turns = [turn.model_dump() for turn in question.messages]
        options = question.sampling.model_dump()
        return answers.respond(StreamedAnswer(self.backend.chat, question.model, turns, question.system, options))

    def _state(self) -> dict[str, Any]:
        backend = self.backend
        tabs = {"chat": backend.chat, "data": backend.data, "vocabulary": backend.vocabulary, "runs": backend.runs}
        return {
            "title": backend.title,
            "texts": texts(),
            "languages": LANGUAGES,
            "example": EXAMPLE,
            "tabs": [name for name, tab in tabs.items() if tab],
            "models": backend.chat.models(),
            "found": backend.data.models() if backend.data else [],
            "chosen": list(backend.chat.chosen),
            "system": backend.chat.system,
            "sampling": posted.initial(backend.chat.settings),
            "presets": PRESETS,
            "templates": list(backend.data.templates) if backend.data else [],
            "recipes": backend.runs.recipes() if backend.runs else [],
            "runs": backend.runs.runs() if backend.runs else [],
        }

    def _run(self, name: str) -> dict[str, Any]:
        assert self.backend.runs
        view = self.backend.runs.view(name)
        return {"view": str(as_html(view)), "running": view.running, "finished": view.finished}

    def _get(self, name: str, call: Callable[[dict[str, str]], Any]) -> Route:
        async def handle(request: Request) -> Response:
            return await self._answer(lambda: call(dict(request.query_params)))

        return Route(f"/{self.language}/api/{name}", handle)

    def _post(self, name: str, body: type[Body], call: Callable[[Body], Any]) -> Route:
        async def handle(request: Request) -> Response:
            try:
                one = await _body(request, body)
            except ValidationError as error:
                return _refused(error)
            return await self._answer(lambda: call(one))

        return Route(f"/{self.language}/api/{name}", handle, methods=["POST"])

    async def _answer(self, call: Callable[[], Any]) -> Response:
        """Return what the call returns, or the problem; its messages are in the page's language."""
        with use_language(self.language):
            try:
                return as_json(await asyncio.to_thread(call))
            except Exception as error:
                return as_json({"problem": explain(error)}, 422)


def as_json(value: Any, status: int = 200) -> Response:
    """Return a JSON response in ASCII: a file's name may hold what UTF-8 cannot."""
    return Response(json.dumps(value), status, media_type="application/json")


async def _body(request: Request, kind: type[Body]) -> Body:
    return kind.model_validate_json(await request.body())


def _refused(error: ValidationError) -> Response:
    first = error.errors()[0]
    place = ".".join(map(str, first["loc"]))
    return as_json({"problem": f"{place}: {first['msg']}"}, 422)
