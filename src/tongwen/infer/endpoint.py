"""Answers from an OpenAI-compatible endpoint (vLLM, SGLang, Ollama, llama-server, …), by the official client.

The key is read from OPENAI_API_KEY and goes nowhere else; a local server needs none.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any

from tongwen.core.errors import MachineError, MissingPackage, ModelError
from tongwen.core.i18n import _
from tongwen.infer.generation import Sampling

AT_ONCE = 8  # requests


class EndpointBackend:
    """A model behind an address. completion: texts are continued, and no template is applied there."""

    def __init__(self, url: str, model: str, *, completion: bool = False) -> None:
        try:
            import openai
        except ImportError:
            raise MissingPackage("openai", _("getting answers from an endpoint"), "endpoint") from None
        self.url, self.model, self.completion, self._openai = url, model, completion, openai
        self._client = openai.OpenAI(base_url=url, api_key=os.environ.get("OPENAI_API_KEY") or "none", max_retries=4)

    def answer_each(
        self, conversations: Sequence[Sequence[Mapping[str, Any]]], sampling: Sampling, take: Callable[[int, str], None]
    ) -> None:
        """Hand each answer to `take` with its place. Raises MachineError when the endpoint cannot be reached, ModelError
        when it refuses."""
        if sampling.beams > 1:
            raise ModelError(_("endpoints do not support beam search"), place=self.url, remedy="--beams 1")
        with ThreadPoolExecutor(AT_ONCE) as pool:
            waiting = {
                pool.submit(self._ask, messages, sampling): place for place, messages in enumerate(conversations)
            }
            try:
                for done in as_completed(waiting):
                    take(waiting[done], done.result())
            finally:
                pool.shutdown(cancel_futures=True)

    def _ask(self, messages: Sequence[Mapping[str, Any]], sampling: Sampling) -> str:
        options: dict[str, Any] = {"model": self.model, "temperature": sampling.temperature, "top_p": sampling.top_p}
        extra: dict[str, float] = {}  # not OpenAI's own words, but vLLM's and SGLang's
        if sampling.top_k:
            extra["top_k"] = sampling.top_k
        if sampling.repetition_penalty != 1.0:
            extra["repetition_penalty"] = sampling.repetition_penalty
        options |= {"max_tokens": sampling.max_new_tokens, "seed": sampling.seed, "extra_body": extra or None}
        try:
            if self.completion:
                text = "".join(str(turn["content"]) for turn in messages)
                answer: Any = self._client.completions.create(prompt=text, **options)
            else:
                turns: Any = [dict(turn) for turn in messages]
                answer = self._client.chat.completions.create(messages=turns, **options)
        except self._openai.APIConnectionError as error:
            raise MachineError(
                _("no response: {cause}").format(cause=error.__cause__ or error),
                place=self.url,
            ) from None
        except self._openai.AuthenticationError:
            raise MachineError(
                _("the endpoint rejected the key"), place=self.url, remedy="export OPENAI_API_KEY=…"
            ) from None
        except self._openai.APIStatusError as error:
            raise ModelError(
                _("the endpoint refused ({status_code}): {message}").format(
                    status_code=error.status_code, message=error.message
                ),
                place=self.url,
                remedy=_("--model must be a name that the endpoint knows: GET /v1/models"),
            ) from None
        except ValueError:  # no JSON at all
            answer = None
        choice = next(iter(getattr(answer, "choices", None) or ()), None)
        held = choice if self.completion else getattr(choice, "message", None)
        found = getattr(held, "text" if self.completion else "content", None)
        if held is None or (self.completion and found is None):
            raise ModelError(
                _("the response is not an answer: {answer!r}").format(answer=str(answer)[:60]),
                place=self.url,
                remedy=_("the address ends with /v1 for most endpoints"),
            )
        return str(found or "")  # of a conversation it may be null: all was thinking
