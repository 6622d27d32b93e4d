"""The routes of OpenAI's API for one chat model: chat, completions, models; streamed or whole."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from pydantic import ValidationError
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from tongwen.core.errors import TongwenError
from tongwen.core.i18n import _
from tongwen.core.tool_parser import ToolParser
from tongwen.serving.auth import REQUEST_SECONDS, error_response
from tongwen.serving.openai_requests import ChatRequest, CompletionRequest, NamedTool, TextRequest
from tongwen.serving.openai_responses import CompletionResponse, EventStream
from tongwen.serving.request_queue import QueueFull, RequestQueue
from tongwen.serving.stream_split import StreamPart, split_calls, split_thinking, until

BYTES_PER_TOKEN = 32  # of a request's body; a token of JSON-escaped Chinese has up to 24
MAX_DISCARDED = 64 << 20  # bytes of an oversized body that are still read, so that its sender receives the error


@dataclass(frozen=True)
class Backend:
    """A model as the server uses it.

    chat_ids: (conversation, tools, beginning of the answer) -> ids; raises TongwenError if it cannot be rendered
    text_ids: a text -> ids; raises TongwenError
    generate: (ids, callback for each new token, settings, beginning of the answer, how many of the likeliest tokens or None
              for no log probabilities, callback for those) -> the answer in pieces, with that beginning
    tool_parser: returns the parser of the model's tool calls; raises TongwenError if it has none
    ended:    whether an answer of these tokens ended on a stop token
    check:    raises RecipeError for invalid settings
    context:  maximum number of tokens, prompt and answer together
    settings: defaults for options that a request leaves out
    """

    name: str
    chat_ids: Callable[[list[dict[str, Any]], list[dict[str, Any]], str], list[int]]
    text_ids: Callable[[str], list[int]]
    generate: Callable[
        [list[int], Callable[[int], None], dict[str, Any], str, int | None, Callable[[dict[str, Any]], None]],
        Iterator[str],
    ]
    tool_parser: Callable[[], ToolParser]
    ended: Callable[[Sequence[int]], bool]
    check: Callable[[dict[str, Any]], object]
    context: int
    settings: dict[str, Any]
    gives_logprobs: bool = True


class RequestError(Exception):
    """A request that is refused, with its error response."""

    def __init__(self, status: int, kind: str, message: str, **headers: str) -> None:
        self.response = error_response(status, kind, message, **headers)
        super().__init__(message)


def make_app(backend: Backend, max_waiting: int) -> Starlette:
    """Return the routes, without authentication. max_waiting: requests that may wait behind the one in progress."""
    server = ApiServer(backend, RequestQueue(max_waiting))
    return Starlette(
        routes=[
            Route("/v1/models", server.models, methods=["GET"]),
            Route("/v1/models/{name:path}", server.model, methods=["GET"]),
            Route("/v1/chat/completions", partial(server.answer, ChatRequest), methods=["POST"]),
            Route("/v1/completions", partial(server.answer, TextRequest), methods=["POST"]),
        ],
        exception_handlers={
            RequestError: lambda request, error: error.response,
            ClientDisconnect: lambda request, error: Response(status_code=499),
            HTTPException: _route_error,
        },
    )


class ApiServer:
    """Handlers of the routes."""

    def __init__(self, backend: Backend, queue: RequestQueue) -> None:
        self.backend, self.queue = backend, queue
        self.started = int(time.time())

    async def models(self, raw_request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._card()]})

    async def model(self, raw_request: Request) -> Response:
        name = raw_request.path_params["name"]
        if name != self.backend.name:
            raise self._no_model(name)
        return JSONResponse(self._card())

    def _card(self) -> dict[str, Any]:
        return {"id": self.backend.name, "object": "model", "created": self.started, "owned_by": "tongwen"}

    def _no_model(self, name: str) -> RequestError:
        message = _("this server has no model {model!r}, only {served!r}").format(model=name, served=self.backend.name)
        return RequestError(404, "model_not_found", message)

    async def answer(self, request_type: type[CompletionRequest], raw_request: Request) -> Response:
        body = await self._read(raw_request)
        request, ids, settings, begin = await asyncio.to_thread(self._parse, request_type, body)
        try:
            logprobs: list[dict[str, Any]] = []
            answer = self.queue.submit(partial(self._generate, request, ids, settings, begin, logprobs))
        except QueueFull as busy:
            message = _("too many requests are waiting")
            raise RequestError(429, "busy", message, retry_after=str(busy.retry_after)) from None
        longest = settings["max_new_tokens"]
        response = CompletionResponse(request, answer, len(ids), longest, self.backend.ended, logprobs)
        return EventStream(response) if request.stream else await _unless_disconnected(raw_request, response)

    async def _read(self, raw_request: Request) -> bytes:
        """Return the request's body. Raises RequestError if it is too large or too slow."""
        limit = max(1 << 16, BYTES_PER_TOKEN * self.backend.context)
        body, size = bytearray(), 0

        async def read() -> None:
            nonlocal size
            async for chunk in raw_request.stream():
                size += len(chunk)
                if size <= limit:
                    body.extend(chunk)
                elif size > MAX_DISCARDED:
                    return

        try:
            await asyncio.wait_for(read(), REQUEST_SECONDS)
        except asyncio.TimeoutError:
            raise RequestError(
                408, "too_slow", _("the client sent the request too slowly"), connection="close"
            ) from None
        if size > limit:
            message = _("the request has {size:,} bytes; the limit is {limit:,}").format(size=size, limit=limit)
            raise RequestError(413, "request_too_large", message, connection="close")
        return bytes(body)

    def _parse(
        self, request_type: type[CompletionRequest], body: bytes
    ) -> tuple[CompletionRequest, list[int], dict[str, Any], str]:
        """Return the request, its prompt as ids, its settings, and what the answer begins with. Raises RequestError if it is
        invalid."""
        begin = ""
        try:
            request = request_type.model_validate_json(body)
        except ValidationError as error:
            raise RequestError(400, "invalid_request_error", _problem(error)) from None
        if request.model != self.backend.name:
            raise self._no_model(request.model)
        if request.top is not None and not self.backend.gives_logprobs:
            message = "logprobs: " + _("this engine gives no log probabilities")
            raise RequestError(400, "invalid_request_error", message)
        try:
            settings = self.backend.settings | request.sampling()
            self.backend.check(settings)
            if isinstance(request, ChatRequest):
                if request.offered:
                    begin = request.begin(self.backend.tool_parser())
                messages = [message.to_dict() for message in request.messages]
                ids = self.backend.chat_ids(messages, request.offered, begin)
            else:
                assert isinstance(request, TextRequest)
                ids = self.backend.text_ids(request.prompt if isinstance(request.prompt, str) else request.prompt[0])
        except TongwenError as error:  # a ModelError when the template fails on this conversation
            raise RequestError(400, "invalid_request_error", error.text()) from None
        available = self.backend.context - len(ids)
        if not ids or available < 1:
            message = _("the prompt has {count} tokens; it must have 1 to {context}").format(
                count=len(ids), context=self.backend.context - 1
            )
            raise RequestError(400, "context_length_exceeded" if ids else "invalid_request_error", message)
        return request, ids, settings | {"max_new_tokens": min(settings["max_new_tokens"], available)}, begin

    def _generate(
        self,
        request: CompletionRequest,
        ids: list[int],
        settings: dict[str, Any],
        begin: str,
        logprobs: list[dict[str, Any]],
        on_token: Callable[[int], None],
    ) -> Iterator[StreamPart]:
        """Yield the parts of the answer. Runs in the queue's thread."""
        pieces = self.backend.generate(ids, on_token, settings, begin, request.top, logprobs.append)
        if request.stops:
            pieces = until(pieces, request.stops)
        if not isinstance(request, ChatRequest):
            return map(StreamPart, pieces)
        parts = split_thinking(pieces)
        if not request.offered:
            return parts
        one = request.parallel_tool_calls is False or isinstance(request.tool_choice, NamedTool)
        return split_calls(parts, self.backend.tool_parser(), request.offered, not one)


async def _unless_disconnected(raw_request: Request, response: CompletionResponse) -> Response:
    """Return the whole answer, or cancel it when the client disconnects."""
    answering = asyncio.ensure_future(response.as_json())
    disconnect = asyncio.ensure_future(raw_request.receive())  # the body has been read: only a disconnect can follow
    try:
        await asyncio.wait({answering, disconnect}, return_when=asyncio.FIRST_COMPLETED)
        return answering.result() if answering.done() else Response(status_code=499)
    finally:
        response.answer.cancel()
        answering.cancel()
        disconnect.cancel()


def _problem(error: ValidationError) -> str:
    """Describe the first invalid field of a request."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]

    return f"{'.'.join(map(str, first['loc']))}: {first['msg'].removeprefix('Value error, ')}".lstrip(": ")


def _route_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    kind = "method_not_allowed" if error.status_code == 405 else "not_found"
    return error_response(error.status_code, kind, f"{request.method} {request.url.path!r}: {error.detail}")
