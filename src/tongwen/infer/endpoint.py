"""Answers from an OpenAI-compatible endpoint (vLLM, SGLang, Ollama, llama-server, …), several at a time.

The key is read from OPENAI_API_KEY and sent nowhere else; a local server needs none. This module needs the package
`openai`.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import openai

from tongwen.core.errors import MachineError, ModelError, TongwenError
from tongwen.core.i18n import _
from tongwen.core.openai_client import OpenAIClient, ReplyTooLarge, TruncatedReply, UnreadableReply, check_address
from tongwen.infer.generation import Sampling

CONCURRENCY = 8  # concurrent requests
RETRIES = 4  # of a request, by OpenAI's client
SECONDS = 900.0  # for a whole reply, all its tries together


class EndpointBackend:
    """A model at an endpoint. completion: continue texts; the endpoint applies no template.

    Raises RecipeError for an address that is not safe.
    """

    def __init__(self, url: str, model: str, *, completion: bool = False) -> None:
        self.url, self.model, self.completion = (
            check_address(url, "--endpoint", has_key=bool(_key())),
            model,
            completion,
        )

    def answer_each(
        self,
        conversations: Sequence[Sequence[Mapping[str, Any]]],
        sampling: Sampling,
        on_answer: Callable[[int, str], None],
        tools: Sequence[Sequence[Mapping[str, Any]]] = (),
    ) -> None:
        """Call `on_answer` with the index and text of each whole answer. tools: of each conversation, if any has some.

        Raises MachineError if the endpoint cannot be reached, ModelError if it refuses, or if answers were cut short: then
        all others have been passed on.
        """
        if sampling.beams > 1:
            raise ModelError(_("endpoints do not support beam search"), place=self.url, remedy="--beams 1")
        offered = tools or [()] * len(conversations)
        if self.completion and any(offered):
            raise ModelError(_("a text that is continued has no place for the tools of its row"), place=self.url)
        asyncio.run(self._answer_each(list(zip(conversations, offered, strict=True)), _options(sampling), on_answer))

    async def _answer_each(
        self,
        asked: Sequence[tuple[Sequence[Mapping[str, Any]], Sequence[Mapping[str, Any]]]],
        options: dict[str, Any],
        on_answer: Callable[[int, str], None],
    ) -> None:
        indexed = enumerate(asked)
        cut: dict[int, str] = {}  # answers that are not whole, with the reason

        async def worker_loop() -> None:
            for index, (messages, tools) in indexed:  # shared by all workers
                offered = {"tools": [*map(dict, tools)]} if tools else {}
                try:
                    on_answer(index, await self._request(client, messages, {**options, **offered}))
                except TruncatedReply as error:
                    cut[index] = str(error)

        async with OpenAIClient(
            self.url, self.model, _key(), place="--endpoint", retries=RETRIES, seconds=SECONDS
        ) as client:
            workers = [asyncio.create_task(worker_loop()) for _ in range(CONCURRENCY)]
            try:
                await asyncio.gather(*workers)
            finally:
                for worker in workers:
                    worker.cancel()
                await asyncio.gather(*workers, return_exceptions=True)
        if cut:
            index, reason = min(cut.items())
            raise ModelError(
                _("{count} answers are not whole; the first is that of prompt {number}: {reason}").format(
                    count=len(cut), number=index + 1, reason=reason
                ),
                place=self.url,
                remedy=_(
                    "`length`: raise --max-new-tokens; `content_filter`: take the prompt out. The other answers are kept"
                ),
            )

    async def _request(
        self, client: OpenAIClient, messages: Sequence[Mapping[str, Any]], options: dict[str, Any]
    ) -> str:
        try:
            if self.completion:
                return await client.complete("".join(str(turn["content"]) for turn in messages), **options)
            return await client.chat(messages, **options)
        except asyncio.TimeoutError:
            raise MachineError(
                _("no whole reply within {seconds:g} seconds").format(seconds=SECONDS), place=self.url
            ) from None
        except openai.APIConnectionError as error:
            if isinstance(cause := error.__cause__, TongwenError):
                raise cause from None
            raise MachineError(
                _("no response: {cause}").format(cause=client.without_key(str(cause or error))),
                place=self.url,
            ) from None
        except openai.AuthenticationError:
            raise MachineError(
                _("the endpoint rejected the key"), place=self.url, remedy="export OPENAI_API_KEY=…"
            ) from None
        except openai.APIStatusError as error:
            raise ModelError(
                _("the endpoint refused ({status_code}): {message}").format(
                    status_code=error.status_code, message=client.without_key(error.message)
                ),
                place=self.url,
                remedy=_("--model must be a name that the endpoint knows: GET /v1/models"),
            ) from None
        except ReplyTooLarge as error:
            raise ModelError(_("the reply is too large: {error}").format(error=error), place=self.url) from None
        except UnreadableReply as error:
            raise ModelError(
                _("the endpoint's reply contains no answer: {error!r}").format(error=str(error)),
                place=self.url,
                remedy=_("the address ends with /v1 for most endpoints"),
            ) from None


def _key() -> str:
    return os.environ.get("OPENAI_API_KEY", "")


def _options(sampling: Sampling) -> dict[str, Any]:
    """Return the sampling options under OpenAI's names, and under those of vLLM and SGLang where OpenAI has none."""
    extra: dict[str, float] = {}
    if sampling.top_k:
        extra["top_k"] = sampling.top_k
    if sampling.repetition_penalty != 1.0:
        extra["repetition_penalty"] = sampling.repetition_penalty
    return {
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "max_tokens": sampling.max_new_tokens,
        "seed": sampling.seed,
        "extra_body": extra or None,
    }
