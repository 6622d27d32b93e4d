"""Answers in the format of OpenAI's API: one JSON object, or server-sent events."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from typing import Any

from starlette.responses import JSONResponse, Response, StreamingResponse

from tongwen.core import console
from tongwen.core.errors import TongwenError, is_out_of_memory
from tongwen.core.i18n import _
from tongwen.core.tool_parser import ToolCall
from tongwen.serving.auth import Receive, Scope, Send, error_response
from tongwen.serving.openai_requests import ChatRequest, CompletionRequest
from tongwen.serving.request_queue import QueuedResponse
from tongwen.serving.stream_split import StreamPart

ARGUMENTS_PIECE = 64  # characters of a call's arguments in one event of a stream


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
