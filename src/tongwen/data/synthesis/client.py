"""Request paid answers from an OpenAI-compatible endpoint: retry when that may help, and never exceed the spending cap.

Only this module retries: the official client's retries are off, because two layers would multiply. An answer counts only
with a finish reason from the endpoint. The API key comes from the environment, is sent to one origin, and is never written.
"""

from __future__ import annotations

import asyncio
import email.utils
import os
import random
import time
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

import httpx2
import openai

from tongwen.core.errors import MachineError, RecipeError, TongwenError
from tongwen.core.i18n import _
from tongwen.core.openai_client import OpenAIClient, ReplyTooLarge, TruncatedReply
from tongwen.recipe.data import Synthesize

MAX_RETRY_AFTER = 120.0  # limit for Retry-After, in seconds
OUTAGE_FAILURES = 5  # failures in a row after which requests are sent one at a time
FATAL_STATUSES = (400, 401, 403, 404, 405, 413, 422)


class RequestFailed(Exception):
    """A request failed after all attempts; the message is the last reason."""


class SpendingMeter:
    """Compare the spending, including the possible cost of running requests, with the cap."""

    def __init__(self, section: Synthesize) -> None:
        self.cap, self.price = section.at_most, section.price
        self.requests = 0
        self.tokens = [0, 0]  # of prompts, of answers
        self.reserved = [0, 0]

    def money(self, tokens: list[int]) -> float:
        price = self.price
        return (tokens[0] * price.input + tokens[1] * price.output) / 1e6 if price else 0.0

    def reserve(self, limit: tuple[int, int]) -> None:
        """Reserve the tokens of a request. Raises MachineError when it could exceed the cap."""
        planned = [spent + kept + new for spent, kept, new in zip(self.tokens, self.reserved, limit, strict=True)]
        for name, value, cap in (
            ("requests", self.requests + 1, self.cap.requests),
            ("tokens", sum(planned), self.cap.tokens),
            ("money", self.money(planned), self.cap.money),
        ):
            if cap is not None and value > cap:
                raise MachineError(
                    _("the next request could exceed the cap of {cap:g} {name}; spent: {spent}").format(
                        cap=cap, name=name, spent=self.summary()
                    ),
                    place=f"synthesize.at_most.{name}",
                    remedy=_("raise the cap or reduce `rows`; the same command continues"),
                )
        self.requests += 1
        self._hold(limit, 1)

    def settle(self, limit: tuple[int, int], used: tuple[int, int]) -> None:
        """Replace the reservation of a finished request by its actual use."""
        self._hold(limit, -1)
        self.count(used)

    def count(self, used: tuple[int, int]) -> None:
        self.tokens = [spent + new for spent, new in zip(self.tokens, used, strict=True)]

    def summary(self) -> str:
        money = f", {self.money(self.tokens):.4g} {_('in money')}" if self.price else ""
        return f"{_('{requests} requests').format(requests=self.requests)}, {sum(self.tokens):,} token{money}"

    def _hold(self, limit: tuple[int, int], sign: int) -> None:
        self.reserved = [kept + sign * new for kept, new in zip(self.reserved, limit, strict=True)]


class SynthesisClient:
    """A client of one endpoint with its retry policy."""

    def __init__(self, section: Synthesize, spending: SpendingMeter, notify: Callable[[str], None]) -> None:
        self.section, self.spending, self.notify = section, spending, notify
        self.schema = section.json_schema == "auto"
        self.failures = 0  # in a row
        self.rest_until = 0.0
        self.next_start = 0.0
        self.probing = asyncio.Lock()
        self.client = OpenAIClient(
            section.endpoint,
            section.model,
            _key(section),
            place="synthesize.endpoint",
            retries=0,
            seconds=section.seconds,
            use_proxy=section.use_proxy,
        )

    async def complete(self, prompt: str, schema: dict[str, Any] | None) -> tuple[str, str, tuple[int, int]]:
        """Return (text, finish reason, tokens of prompt and answer). Raises RequestFailed, or TongwenError when all requests
        would fail."""
        limit = (len(prompt.encode()), self.section.max_tokens)  # a prompt has at most as many tokens as bytes
        reason = ""
        for attempt in range(self.section.attempts):
            async with _RequestSlot(self):
                self.spending.reserve(limit)
                used = (0, 0)
                try:
                    answer = await asyncio.wait_for(self._request(prompt, schema), self.section.seconds)
                    used = answer[2]
                    self.failures = 0
                    return answer
                except (
                    openai.APIError,
                    TruncatedReply,
                    ReplyTooLarge,
                    asyncio.TimeoutError,
                    ValueError,
                    httpx2.HTTPError,
                ) as error:
                    reason, used = self._handle_error(error), (0, 0) if _is_unbilled(error) else limit
                finally:
                    self.spending.settle(limit, used)
            await asyncio.sleep(random.uniform(0, min(60.0, self.section.pause * 2**attempt)))  # noqa: S311 (full jitter)
        raise RequestFailed(reason)

    async def _request(self, prompt: str, schema: dict[str, Any] | None) -> tuple[str, str, tuple[int, int]]:
        section = self.section
        options: dict[str, Any] = {}
        if schema and self.schema:
            options = {"response_format": {"type": "json_schema", "json_schema": {"name": "tasks", "schema": schema}}}
        text, finish, tokens = await self.client.stream_chat(
            [{"role": "user", "content": prompt}],
            temperature=section.temperature,
            top_p=section.top_p,
            max_tokens=section.max_tokens,
            **options,
        )
        if not tokens or not tokens[1]:  # at least as many characters as tokens
            tokens = (tokens[0] if tokens else len(prompt), len(text))
        return text, finish, tokens

    def _handle_error(self, error: Exception) -> str:
        """Return the reason of a failure that is worth a retry. Raises TongwenError when no request can succeed."""
        if isinstance(cause := error.__cause__, TongwenError):
            raise cause
        self.failures += 1
        if not isinstance(error, openai.APIStatusError):
            return f"{type(error).__name__}: {self.client.without_key(str(error)):.200}"
        status, code = error.status_code, getattr(error, "code", None)
        if status in (400, 422) and self.schema and "response_format" in str(error):
            self.schema = False
            self.notify(_("the endpoint does not support JSON schema: not using it"))
            return "json_schema"
        if status in FATAL_STATUSES or code == "insufficient_quota" or 300 <= status < 400:
            raise RecipeError(
                _("the endpoint refused the request ({status}): {error:.300}").format(
                    status=status, error=self.client.without_key(str(error))
                ),
                place="synthesize.endpoint",
                remedy=_("check synthesize.endpoint, synthesize.model and the key in ${section}").format(
                    section=self.section.key
                ),
            )
        if status == 429:
            self.failures -= 1  # the endpoint works and names the time for the next try
            self.rest_until = max(self.rest_until, time.monotonic() + retry_after(error.response.headers))
        return f"HTTP {status}"


class _RequestSlot:
    """Wait until a request may start: keep the rate limit, obey Retry-After, and during an outage send one probe at a time
    with growing pauses."""

    def __init__(self, endpoint: SynthesisClient) -> None:
        self.endpoint, self.probes = endpoint, False

    async def __aenter__(self) -> None:
        endpoint = self.endpoint
        if endpoint.failures >= OUTAGE_FAILURES:
            await endpoint.probing.acquire()
            self.probes = True
            if endpoint.failures >= OUTAGE_FAILURES:  # the outage has not ended during the wait
                await asyncio.sleep(min(60.0, endpoint.section.pause * 2 ** (endpoint.failures - OUTAGE_FAILURES + 1)))
        while (rest := endpoint.rest_until - time.monotonic()) > 0:
            await asyncio.sleep(rest)
        if endpoint.section.requests_per_minute:
            now = time.monotonic()
            start = max(now, endpoint.next_start)
            endpoint.next_start = start + 60 / endpoint.section.requests_per_minute
            await asyncio.sleep(start - now)

    async def __aexit__(self, *_unused: object) -> None:
        if self.probes:
            self.endpoint.probing.release()


def _is_unbilled(error: Exception) -> bool:
    """Whether a failed request was certainly not billed: the endpoint refused it, or it never arrived."""
    unreached = isinstance(error, openai.APIConnectionError) and not isinstance(error, openai.APITimeoutError)
    return unreached or isinstance(error, openai.APIStatusError)


def retry_after(headers: Any) -> float:
    """Return the seconds that a 429 response asks to wait (number or date); 1 for other values and past dates."""
    value = headers.get("retry-after", "")
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(value).timestamp() - time.time()
        except ValueError:
            seconds = 1.0
    return min(MAX_RETRY_AFTER, seconds) if seconds > 0 else 1.0


def _key(section: Synthesize) -> str:
    key = os.environ.get(section.key, "")
    if not key and urlsplit(section.endpoint).scheme == "https":
        raise RecipeError(
            _("the key is not in the environment"),
            place=f"synthesize.key: {section.key}",
            remedy=f"export {section.key}=…",
        )
    return key
