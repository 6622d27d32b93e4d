"""The routes of OpenAI's API for one chat model: chat, completions, models; streamed or whole.

The request models list all fields that a client may send. An unknown field is an error and is not ignored: an answer that
silently disregards an option is worse than none.
"""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from tongwen.core import console
from tongwen.core.errors import TongwenError, is_out_of_memory
from tongwen.core.i18n import _
from tongwen.core.json_schema import schema_problem
from tongwen.core.tool_parser import ToolCall, ToolParser
from tongwen.serving.auth import REQUEST_SECONDS, Receive, Scope, Send, error_response
from tongwen.serving.request_queue import QueuedResponse, QueueFull, RequestQueue
from tongwen.serving.stream_split import StreamPart, split_calls, split_thinking, until

NO_PARAMETERS = {"type": "object", "properties": {}}
ARGUMENTS_PIECE = 64  # characters of a call's arguments in one event of a stream
TOP = 20  # likeliest tokens that a request may ask for
TURNS = 1000  # of a conversation, at most
BYTES_PER_TOKEN = 32  # of a request's body; a token of JSON-escaped Chinese has up to 24
MAX_DISCARDED = 64 << 20  # bytes of an oversized body that are still read, so that its sender receives the error

Zero = Annotated[float, Field(ge=0, le=0)]


# Values of words that no field knows, with which they ask for nothing; and words that never change an answer.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "tool_choice": ("auto",),
    "function_call": ("auto",),
    "parallel_tool_calls": (True,),
    "service_tier": ("auto", "default"),
    "modalities": (["text"],),
    "verbosity": ("medium",),
    "best_of": (1,),
    "top_logprobs": (0,),
    "min_p": (0,),
}
WITHOUT_EFFECT = {"metadata", "name", "prompt_cache_key", "safety_identifier"}


class StrictModel(BaseModel):
    """An object of a request: an unknown word is refused, unless it asks for nothing."""

    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _leave_out_neutral_words(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        return {
            name: value for name, value in values.items() if name in cls.model_fields or not _is_neutral(name, value)
        }


def _is_neutral(name: str, value: Any) -> bool:
    """Whether a word that we do not know asks for nothing by this value."""
    if value is None or value is False or value in ("", [], {}, "none") or name in WITHOUT_EFFECT:
        return True
    return any(type(value) is type(one) and value == one for one in NEUTRAL.get(name, ()))


class TextPart(StrictModel):
    type: Literal["text"]
    text: str


class CalledFunction(StrictModel):
    name: str
    arguments: str

    @field_validator("arguments")
    @classmethod
    def _check_object(cls, text: str) -> str:
        try:
            if isinstance(json.loads(text), dict):
                return text
        except (ValueError, RecursionError):
            pass
        raise ValueError(_("not the JSON text of an object"))


class RequestCall(StrictModel):
    id: Annotated[str, Field(min_length=1)]
    type: Literal["function"] = "function"
    function: CalledFunction


class RequestMessage(StrictModel):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    reasoning_content: str | None = None
    tool_calls: list[RequestCall] | None = None
    tool_call_id: str | None = None
    name: str | None = None

    @model_validator(mode="after")
    def _check_role(self) -> RequestMessage:
        if self.content is None and not self.tool_calls:
            raise ValueError(_("content is missing"))
        if self.tool_calls and self.role != "assistant":
            raise ValueError(_("only an assistant has tool_calls"))
        if (self.tool_call_id is None) == (self.role == "tool"):
            raise ValueError(_("a message of a tool, and no other, names the call that it answers: tool_call_id"))
        return self

    def to_dict(self) -> dict[str, Any]:
        text = self.content or ""
        text = text if isinstance(text, str) else "".join(part.text for part in text)
        message: dict[str, Any] = {"role": "system" if self.role == "developer" else self.role, "content": text}
        if self.reasoning_content:
            message["reasoning_content"] = self.reasoning_content
        if self.tool_calls:
            message["tool_calls"] = [call.model_dump() for call in self.tool_calls]
            for call in message["tool_calls"]:
                call["function"]["arguments"] = json.loads(call["function"]["arguments"])
        if self.role == "tool":
            message["tool_call_id"] = self.tool_call_id
            message |= {"name": self.name} if self.name else {}
        return message


class FunctionDefinition(StrictModel):
    name: Annotated[str, Field(pattern=r"^[\w.-]{1,64}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: Literal[False] | None = None

    @field_validator("parameters")
    @classmethod
    def _check_schema(cls, schema: dict[str, Any] | None) -> dict[str, Any] | None:
        if schema and schema.get("type", "object") != "object":
            raise ValueError(_("the parameters of a function are an object: type"))
        if problem := schema_problem(schema or {}, "parameters"):
            raise ValueError(problem)
        return schema


class ToolDefinition(StrictModel):
    type: Literal["function"]
    function: FunctionDefinition

    def to_dict(self) -> dict[str, Any]:
        function = self.function.model_dump(exclude_none=True)
        return {"type": "function", "function": {"description": "", "parameters": NO_PARAMETERS, **function}}


class FunctionName(StrictModel):
    name: str


class NamedTool(StrictModel):
    type: Literal["function"]
    function: FunctionName


class StreamOptions(StrictModel):
    include_usage: bool = False


class TextFormat(StrictModel):
    type: Literal["text"]


class CompletionRequest(StrictModel):
    """Fields that chat and completions share. The last ones are accepted only with the value that has no effect."""

    model: str
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    stop: str | Annotated[list[str], Field(max_length=16)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    n: Annotated[int, Field(ge=1, le=1)] | None = None
    presence_penalty: Zero | None = None
    frequency_penalty: Zero | None = None

    @property
    def top(self) -> int | None:
        """How many of the likeliest tokens to give for each token; None for no log probabilities."""
        return None

    @property
    def stops(self) -> list[str]:
        return [stop for stop in ([self.stop] if isinstance(self.stop, str) else self.stop or []) if stop]

    def sampling(self) -> dict[str, Any]:
        """Return the request's sampling options under the names of `Sampling`."""
        values = {name: getattr(self, name) for name in ("temperature", "top_p", "top_k", "repetition_penalty", "seed")}
        return {name: value for name, value in values.items() if value is not None} | self._length()

    def _length(self) -> dict[str, int]:
        return {} if self.max_tokens is None else {"max_new_tokens": self.max_tokens}


class ChatRequest(CompletionRequest):
    messages: Annotated[list[RequestMessage], Field(min_length=1, max_length=TURNS)]
    max_completion_tokens: int | None = None
    response_format: TextFormat | None = None
    tools: list[ToolDefinition] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=TOP)] | None = None

    @property
    def top(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    @model_validator(mode="after")
    def _check_tools(self) -> ChatRequest:
        if self.top_logprobs and not self.logprobs:
            raise ValueError(_("top_logprobs needs logprobs: true"))
        names = [tool.function.name for tool in self.tools or ()]
        if len({*names}) < len(names):
            raise ValueError(_("tools: two have the same name"))
        if self.tool_choice == "required" and not names:
            raise ValueError(_("tool_choice: there are no tools"))
        if isinstance(self.tool_choice, NamedTool) and self.tool_choice.function.name not in names:
            raise ValueError(_("tool_choice: no tool is called {name!r}").format(name=self.tool_choice.function.name))
        called: set[str] = set()
        for number, message in enumerate(self.messages):
            called |= {call.id for call in message.tool_calls or ()}
            if message.role == "tool" and message.tool_call_id not in called:
                raise ValueError(
                    _("messages.{number}: no call before it has the id {id!r}").format(
                        number=number, id=message.tool_call_id
                    )
                )
        return self

    @property
    def offered(self) -> list[dict[str, Any]]:
        """The tools that the model sees: none with `tool_choice: none`, so that it cannot call any."""
        return [] if self.tool_choice == "none" else [tool.to_dict() for tool in self.tools or ()]

    def begin(self, parser: ToolParser) -> str:
        """Return what the answer begins with: with `required` or a named function, a call."""
        if isinstance(self.tool_choice, NamedTool):
            return parser.forced(self.tool_choice.function.name)
        return parser.forced(None) if self.tool_choice == "required" else ""

    def _length(self) -> dict[str, int]:
        length = self.max_completion_tokens
        return super()._length() if length is None else {"max_new_tokens": length}


class TextRequest(CompletionRequest):
    prompt: str | Annotated[list[str], Field(min_length=1, max_length=1)]
    logprobs: Annotated[int, Field(ge=0, le=TOP)] | Literal[False] | None = None

    @property
    def top(self) -> int | None:
        return self.logprobs if type(self.logprobs) is int else None


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


class CompletionResponse:
    """An answer in the format of chat or of completions."""

    def __init__(
        self,
        request: CompletionRequest,
        answer: QueuedResponse[StreamPart],
        prompt_tokens: int,
        max_tokens: int,
        ended: Callable[[Sequence[int]], bool],
        logprobs: list[dict[str, Any]],
    ) -> None:
        self.answer, self.prompt_tokens, self.max_tokens, self.ended = answer, prompt_tokens, max_tokens, ended
        self.calls = 0
        self.logprobs, self.told, self.characters = logprobs, 0 if request.top is not None else -1, 0
        self.chat = isinstance(request, ChatRequest)
        self.shows_usage = bool(request.stream_options and request.stream_options.include_usage)
        name = ("chatcmpl-" if self.chat else "cmpl-") + uuid.uuid4().hex
        self.head = {"id": name, "created": int(time.time()), "model": request.model}

    async def as_json(self) -> Response:
        """Return the whole answer as one JSON response."""
        try:
            parts = [part async for part in self.answer]
        except Exception as error:
            return _failure_response(error)
        text, thought = (
            "".join(part.text for part in parts if part.thinking is is_thinking) for is_thinking in (False, True)
        )
        calls = [part.call.to_dict(_call_id()) for part in parts if part.call]
        self.calls = len(calls)
        content: dict[str, Any] = {"text": text}
        if self.chat:
            message = {"role": "assistant", "content": text or (None if calls else "")}
            message |= {"reasoning_content": thought} if thought else {}
            content = {"message": message | ({"tool_calls": calls} if calls else {})}
        choice = {"index": 0, **content, "finish_reason": self._finish(), "logprobs": self._new_logprobs()}
        return JSONResponse({**self._head(""), "choices": [choice], "usage": self._usage()})

    async def events(self) -> AsyncIterator[str]:
        """Yield the answer as server-sent events. A failure becomes an event too: the status has been sent already."""
        try:
            yield self._event({"role": "assistant", "content": ""} if self.chat else "")
            async for part in self.answer:
                if part.text:
                    delta = {"reasoning_content" if part.thinking else "content": part.text}
                    yield self._event(delta if self.chat else part.text)
                if part.call:
                    for delta in _call_deltas(part.call, self.calls):
                        yield self._event({"tool_calls": [delta]})
                    self.calls += 1
        except Exception as error:
            yield f"data: {bytes(_failure_response(error).body).decode()}\n\n"
            return
        yield self._event({} if self.chat else "", self._finish())
        if self.shows_usage:
            yield _data({**self._head(".chunk"), "choices": [], "usage": self._usage()})
        yield "data: [DONE]\n\n"

    def _event(self, content: Any, finish: str | None = None) -> str:
        choice = {"index": 0, "delta" if self.chat else "text": content, "finish_reason": finish}
        choice["logprobs"] = self._new_logprobs()
        return _data({**self._head(".chunk"), "choices": [choice]})

    def _new_logprobs(self) -> dict[str, Any] | None:
        """Return the log probabilities of the tokens since the last event; None if the request did not ask for any."""
        if self.told < 0:
            return None
        new = self.logprobs[self.told :]
        self.told += len(new)
        if self.chat:
            return {"content": new, "refusal": None}
        offsets = []
        for token in new:
            offsets.append(self.characters)
            self.characters += len(token["token"])
        return {
            "tokens": [token["token"] for token in new],
            "token_logprobs": [token["logprob"] for token in new],
            "top_logprobs": [{one["token"]: one["logprob"] for one in token["top_logprobs"]} for token in new],
            "text_offset": offsets,
        }

    def _head(self, chunk: str) -> dict[str, Any]:
        return {**self.head, "object": f"chat.completion{chunk}" if self.chat else "text_completion"}

    def _usage(self) -> dict[str, int]:
        completion_tokens = len(self.answer.tokens)
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": self.prompt_tokens + completion_tokens,
        }

    def _finish(self) -> str:
        tokens = self.answer.tokens
        if len(tokens) >= self.max_tokens and not self.ended(tokens):
            return "length"
        return "tool_calls" if self.calls else "stop"


class EventStream(StreamingResponse):
    """A streamed answer. When its reader disconnects, it is cancelled and its place becomes free."""

    def __init__(self, response: CompletionResponse) -> None:
        super().__init__(response.events(), media_type="text/event-stream", headers={"cache-control": "no-store"})
        self.answer = response.answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.answer.cancel()


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


def _call_id() -> str:
    """Return an id of the form that the strictest chat templates ask for (Mistral's: nine letters and digits)."""
    return uuid.uuid4().hex[:9]


def _call_deltas(call: ToolCall, index: int) -> Iterator[dict[str, Any]]:
    """Yield a call as a stream gives it: its name first, then its arguments in pieces."""
    head = call._replace(arguments="").to_dict(_call_id())
    yield {"index": index, **head}
    for at in range(0, len(call.arguments), ARGUMENTS_PIECE):
        yield {"index": index, "function": {"arguments": call.arguments[at : at + ARGUMENTS_PIECE]}}


def _data(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"


def _failure_response(error: Exception) -> Response:
    """Return the error response for a failed answer, and print the error in the terminal under the same number."""
    number = uuid.uuid4().hex[:8]
    console.error(f"{number}: {type(error).__name__}: {error!s:.300}".replace("\n", " "))
    if is_out_of_memory(error):
        message = _("out of memory")
    elif isinstance(error, TongwenError):
        message = error.rule
    else:
        message = _("the model failed")
    return error_response(500, "server_error", f"{message} ({number})")


def _problem(error: ValidationError) -> str:
    """Describe the first invalid field of a request."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]

    return f"{'.'.join(map(str, first['loc']))}: {first['msg'].removeprefix('Value error, ')}".lstrip(": ")


def _route_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    kind = "method_not_allowed" if error.status_code == 405 else "not_found"
    return error_response(error.status_code, kind, f"{request.method} {request.url.path!r}: {error.detail}")
