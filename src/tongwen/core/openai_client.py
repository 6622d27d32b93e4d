"""Client for a model behind an OpenAI-compatible API (vLLM, SGLang, Ollama, llama-server, …), on top of the official one.

The key goes to one origin: redirects are not followed, a web page is no reply, and no text that comes back shows the key, even
where the endpoint repeats it. Importing this module needs the package `openai`.
"""

from __future__ import annotations

import asyncio
import ipaddress
import json
import urllib.request
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

import httpx2
import openai

from tongwen.core.errors import RecipeError
from tongwen.core.i18n import _

LARGEST = 8 << 20  # bytes of a response
SHORTEST_KEY = 8  # characters; shorter ones, such as EMPTY, stand for none and are words of any text
CUT_SHORT = ("length", "content_filter")  # finish reasons of an answer that is not whole


class UnreadableReply(Exception):
    """A response without an answer, with its first characters."""


class TruncatedReply(Exception):
    """A response that ended early: the stream broke off, or the endpoint says so (`length`, `content_filter`)."""


class ReplyTooLarge(Exception):
    """A response larger than LARGEST bytes."""


class OpenAIClient:
    """One model of one endpoint.

    The official client's errors (`openai.APIError`) are not caught.
    """

    def __init__(
        self, url: str, model: str, key: str, *, place: str, retries: int, seconds: float, use_proxy: bool | None = None
    ) -> None:
        """key: empty for a server without authentication. place: where the user wrote the address, for messages. retries: of
        the official client. seconds: for a whole reply. use_proxy: the environment's proxies; None: if it names one.

        Raises RecipeError when it is not safe to send the key to this address.
        """
        self.model, self.seconds, self._key = model, seconds, key
        behind_proxy = bool(urllib.request.getproxies()) if use_proxy is None else use_proxy
        self._client = openai.AsyncOpenAI(
            base_url=check_address(url, place, has_key=bool(key)),
            api_key=key or "none",
            max_retries=retries,
            timeout=httpx2.Timeout(seconds, connect=min(10.0, seconds)),
            default_headers={"Accept-Encoding": "identity"},
            http_client=httpx2.AsyncClient(
                # Behind a proxy the library uses its own transport; then only the text counts towards the size limit.
                transport=None if behind_proxy else CappedTransport(),
                trust_env=behind_proxy,
                follow_redirects=False,
                event_hooks={"response": [_refuse_web_page(place)]},
            ),
        )
        # Import these now, which may take seconds; otherwise the first request's timeout includes it.
        self._chat, self._completions = self._client.chat.completions, self._client.completions

    async def __aenter__(self) -> OpenAIClient:
        return self

    async def __aexit__(self, *_unused: object) -> None:
        await self._client.close()

    async def chat(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> str:
        """Return the answer to a conversation, its calls of tools as the template `chatml` writes them; empty when the model
        only produced thinking. Raises UnreadableReply, TruncatedReply, or asyncio.TimeoutError."""
        turns: Any = [dict(turn) for turn in messages]
        reply = await self._read(self._chat.create(model=self.model, messages=turns, **options))
        message = getattr(self._whole_choice(reply), "message", None)
        if message is None:
            raise UnreadableReply(self.without_key(str(reply))[:60])
        text = str(getattr(message, "content", None) or "")
        calls = map(_written, getattr(message, "tool_calls", None) or ())
        return self.without_key("\n".join(filter(None, [text, *calls])))

    async def complete(self, prompt: str, **options: Any) -> str:
        """Return the continuation of a text. Raises UnreadableReply, TruncatedReply, or asyncio.TimeoutError."""
        reply = await self._read(self._completions.create(model=self.model, prompt=prompt, **options))
        text = getattr(self._whole_choice(reply), "text", None)
        if text is None:
            raise UnreadableReply(self.without_key(str(reply))[:60])
        return self.without_key(str(text))

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
        return self.without_key(text), finish, tokens

    def without_key(self, text: str) -> str:
        """Return a text of the endpoint without the key, which it may repeat."""
        key = self._key.strip()
        return text.replace(key, "…") if len(key) >= SHORTEST_KEY else text

    def _whole_choice(self, reply: Any) -> Any:
        """Return the first choice of a response. Raises TruncatedReply if it is not a whole answer."""
        choice = _first_choice(reply)
        if (finish := getattr(choice, "finish_reason", None)) in CUT_SHORT:
            raise TruncatedReply(finish)
        return choice

    async def _read(self, request: Awaitable[Any]) -> Any:
        """Return the response, of any type: the official client accepts any JSON, and a web page as its text."""
        try:
            return await asyncio.wait_for(request, self.seconds)
        except ValueError:  # not JSON
            return None


def check_address(address: str, place: str, *, has_key: bool = True) -> str:
    """Return the base URL. Raises RecipeError when it is not safe to send a key to it."""
    try:
        parts = urlsplit(address)
        host = parts.hostname or ""
    except ValueError:  # a bracket without its partner
        raise RecipeError(_("this is not a plain endpoint address"), place=place, remedy="https://HOST/v1") from None
    try:
        is_local = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        is_local = False
    if parts.username or parts.password or not host or parts.scheme not in ("https", "http"):
        rule = _("this is not a plain endpoint address")
    elif parts.scheme == "http" and has_key and not is_local:
        rule = _("without https, anyone on the way can read the key")
    else:
        return address
    shown = f"{parts.scheme}://{host}{parts.path}"  # without user name and password
    raise RecipeError(f"{shown}: {rule}", place=place, remedy="https://HOST/v1")


def _refuse_web_page(place: str) -> Callable[[Any], Awaitable[None]]:
    """Return a hook that raises RecipeError when the response is a web page: a login, a portal, a wrong URL."""

    async def check(response: Any) -> None:
        if response.status_code == 200 and "html" in response.headers.get("content-type", ""):
            raise RecipeError(
                _("the endpoint answers with a web page"),
                place=place,
                remedy=_("the address ends with /v1 for most endpoints"),
            )

    return check


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
