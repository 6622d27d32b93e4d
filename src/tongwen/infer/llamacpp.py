"""Generate with llama.cpp from a `.gguf` file (wheels of `xllamacpp`).

Its server runs inside this process, on loopback and with a random key. Prompts are sent as ids, so the model gets exactly the
tokens that it was trained on.
"""

from __future__ import annotations

import json
import os
import secrets
import urllib.error
import urllib.request
from collections.abc import Generator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from importlib.util import find_spec
from threading import BoundedSemaphore
from typing import Any, ClassVar

from tongwen.core.errors import MissingPackage, ModelError
from tongwen.core.i18n import _
from tongwen.infer.generation import Logprobs, OnAnswer, Sampling, TextGenerator, cache_bytes

SLOTS = 8  # maximum number of prompts at a time
CACHE = 2 << 30  # bytes for keys and values; llama.cpp allocates all of them when it opens a file
MIN_CONTEXT = 4096  # tokens of context for a prompt, even if they need more memory than CACHE


@dataclass(frozen=True)
class LlamaCppBackend(TextGenerator):
    """A generator whose model is a llama.cpp server. slots: number of prompts that it answers at a time."""

    gives_logprobs: ClassVar[bool] = False
    key: str = ""
    slots: int = 1
    free_slots: BoundedSemaphore = field(default_factory=BoundedSemaphore)

    def answer_all(
        self, prompts: Sequence[list[int]], sampling: Sampling, on_answer: OnAnswer, rows: int = SLOTS
    ) -> None:
        """As in the base class, but always `slots` prompts at a time: llama.cpp allocated their memory when it was opened."""
        for prompt in prompts:
            self._check_fits(prompt, sampling)
        if sampling.beams > 1:
            raise ModelError(_("llama.cpp does not support beam search"), remedy="--engine batched")
        with ThreadPoolExecutor(self.slots) as pool:
            waiting = {pool.submit(self._complete, prompt, sampling): index for index, prompt in enumerate(prompts)}
            try:
                for done in as_completed(waiting):
                    on_answer(waiting[done], self._until_stop(done.result()["tokens"]))
            finally:
                pool.shutdown(cancel_futures=True)

    def _new_ids(
        self, prompt: list[int], sampling: Sampling, logprobs: Logprobs | None = None
    ) -> Generator[int, None, None]:
        """Request one token at a time: llama.cpp's own stream omits the ids of an incomplete character. The slot keeps the
        cache of the earlier tokens, so only new ones are computed. Each answer holds a slot to itself, so that no other
        answer takes it between two tokens."""
        new_ids: list[int] = []
        with self.free_slots:
            for _index in range(self._limit_new_tokens(len(prompt), sampling).max_new_tokens):
                # A different seed for each token: with the same seed, each would be drawn with the same random number.
                seed = None if sampling.seed is None else (sampling.seed + len(new_ids)) % (1 << 32)
                one_token = sampling.override(max_new_tokens=1, seed=seed)
                result = self._complete([*prompt, *new_ids], one_token)
                new_ids += result["tokens"]
                yield from result["tokens"]
                if result["stop_type"] == "eos" or new_ids[-1] in self.stop_ids:
                    return

    def _complete(self, prompt: list[int], sampling: Sampling) -> dict[str, Any]:
        """Return llama.cpp's answer to a prompt, with `tokens` and `stop_type`."""
        body = {
            "prompt": prompt,
            "n_predict": self._limit_new_tokens(len(prompt), sampling).max_new_tokens,
            "temperature": sampling.temperature,
            "top_k": sampling.top_k if sampling.temperature else 1,
            "top_p": sampling.top_p,
            "min_p": 0.0,
            "repeat_penalty": sampling.repetition_penalty,
            "repeat_last_n": self.context,
            "seed": -1 if sampling.seed is None else sampling.seed,
            "return_tokens": True,
        }
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {self.key}"}
        address = f"{self.model.listening_address}/completion"
        request = urllib.request.Request(address, json.dumps(body).encode(), headers)  # noqa: S310 (our own server)
        try:
            with urllib.request.urlopen(request) as answer:  # noqa: S310
                return dict(json.load(answer))
        except urllib.error.HTTPError as error:
            raise ModelError(error.read().decode(errors="replace"), place="llama.cpp") from None


def is_installed() -> bool:
    return find_spec("xllamacpp") is not None


def open_file(
    file: str, tokenizer: Any, stop_ids: tuple[int, ...], config: Any, context: int, rows: int
) -> LlamaCppBackend:
    """Open a file with llama.cpp. context: the model's maximum; it and the number of slots (at most `rows`) are reduced to what
    fits into CACHE.

    Raises MissingPackage and ModelError.
    """
    try:
        import xllamacpp
    except ImportError:
        raise MissingPackage("xllamacpp", "llama.cpp", "llamacpp") from None
    capacity = CACHE // cache_bytes(config, 2)  # tokens
    context = min(context, max(capacity, MIN_CONTEXT))
    slots = min(max(capacity // context, 1), SLOTS, rows)
    key = secrets.token_urlsafe(24)
    params = xllamacpp.CommonParams()
    params.model.path, params.api_keys = file, [key]
    params.n_ctx, params.n_parallel, params.kv_unified = slots * context, slots, False
    params.cache_ram_mib = 0  # otherwise it keeps up to 8 GB of keys and values of earlier prompts
    params.warmup, params.verbosity = False, -1
    params.cpuparams.n_threads = int(os.environ.get("OMP_NUM_THREADS", "0")) or os.cpu_count() or 1
    try:
        server = xllamacpp.Server(params)
    except RuntimeError as error:
        raise ModelError(_("llama.cpp cannot open it: {error}").format(error=error), place=file) from None
    return LlamaCppBackend(
        server, tokenizer, stop_ids, context, key=key, slots=slots, free_slots=BoundedSemaphore(slots)
    )
