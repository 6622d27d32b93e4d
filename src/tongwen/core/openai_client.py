"""Client for a model behind an OpenAI-compatible API (vLLM, SGLang, Ollama, llama-server, …), on top of the official one.

Importing this module needs the package `openai`.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

import httpx2
import openai

from tongwen.core.i18n import _

LARGEST = 8 << 20  # bytes of a response


class UnreadableReply(Exception):
    """A response without an answer, with its first characters."""


class TruncatedReply(Exception):
    """A response that ended early."""


class ReplyTooLarge(Exception):
    """A response larger than LARGEST bytes."""


class OpenAIClient:
    """One model of one endpoint.

    The official client's errors (`openai.APIError`) are not caught.
    """

    def __init__(self, url: str, model: str, key: str, *, retries: int, **options: Any) -> None:
        """key: empty for a server without authentication. retries, options: passed to the official client."""
        self.model = model
        self._client = openai.AsyncOpenAI(base_url=url, api_key=key or "none", max_retries=retries, **options)
        # Import these now, which may take seconds; otherwise the first request's timeout includes it.
        self._chat, self._completions = self._client.chat.completions, self._client.completions

    async def __aenter__(self) -> OpenAIClient:
        return self

    async def __aexit__(self, *_unused: object) -> None:
        await self._client.close()

    async def chat(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> str:
        """Return the answer to a conversation, its calls of tools as the template `chatml` writes them; empty when the model
        only produced thinking. Raises UnreadableReply."""
        turns: Any = [dict(turn) for turn in messages]
        reply = await self._read(self._chat.create(model=self.model, messages=turns, **options))
        message = getattr(_first_choice(reply), "message", None)
        if message is None:
            raise UnreadableReply(str(reply)[:60])
        text = str(getattr(message, "content", None) or "")
        return "\n".join(filter(None, [text, *map(_written, getattr(message, "tool_calls", None) or ())]))

    async def complete(self, prompt: str, **options: Any) -> str:
        """Return the continuation of a text. Raises UnreadableReply."""
        reply = await self._read(self._completions.create(model=self.model, prompt=prompt, **options))
        text = getattr(_first_choice(reply), "text", None)
        if text is None:
            raise UnreadableReply(str(reply)[:60])
        return str(text)

    async def stream_chat(
        self, messages: Sequence[Mapping[str, Any]], **options: Any
    ) -> tuple[str, str, tuple[int, int] | None]:
        """Stream an answer; return (text, finish reason, tokens of prompt and answer if the endpoint counts them).

        Raises TruncatedReply or ReplyTooLarge.
        """
        text, finish, tokens = "", None, None
        turns: Any = [dict(turn) for turn in messages]
        stream: Any = await self._chat.create(
            model=self.model, messages=turns, stream=True, stream_options={"include_usage": True}, **options
        )
        async for chunk in stream:
            if chunk.usage:
                tokens = (chunk.usage.prompt_tokens, chunk.usage.completion_tokens)
            for choice in chunk.choices or ():
                text += (choice.delta and choice.delta.content) or ""
                finish = choice.finish_reason or finish
            if len(text) > LARGEST:
                raise ReplyTooLarge
        if finish is None:
            raise TruncatedReply(_("the stream ended early"))
        if finish == "content_filter":
            raise TruncatedReply(finish)
        return text, finish, tokens

    async def _read(self, request: Any) -> Any:
        """Return the response, of any type: the official client accepts any JSON, and a web page as its text."""
        try:
            return await request
        except ValueError:  # not JSON
            return None


def _written(call: Any) -> str:
    function = getattr(call, "function", None)
    name = json.dumps(getattr(function, "name", None), ensure_ascii=False)
    return f'<tool_call>\n{{"name": {name}, "arguments": {getattr(function, "arguments", None) or "{}"}}}\n</tool_call>'


def _first_choice(reply: Any) -> Any:
    return next(iter(getattr(reply, "choices", None) or ()), None)


class CappedTransport(httpx2.AsyncHTTPTransport):
    """Count the bytes of a response while they arrive, and reject compressed responses."""

    async def handle_async_request(self, request: Any) -> Any:
        response = await super().handle_async_request(request)
        if response.headers.get("content-encoding", "identity") != "identity":
            await response.aclose()
            raise httpx2.DecodingError("a packed reply")
        return httpx2.Response(
            response.status_code,
            headers=response.headers,
            stream=_CountedStream(response.stream),
            extensions=response.extensions,
        )


class _CountedStream(httpx2.AsyncByteStream):
    def __init__(self, stream: Any) -> None:
        self.stream = stream

    async def __aiter__(self) -> AsyncIterator[bytes]:
        size = 0
        async for block in self.stream:
            size += len(block)
            if size > LARGEST:
                raise ReplyTooLarge(f"more than {LARGEST} bytes")
            yield block

    async def aclose(self) -> None:
        await self.stream.aclose()
