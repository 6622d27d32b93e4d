"""A `.gguf` file answered by llama.cpp itself (wheels of `xllamacpp`): its server runs inside this process, on loopback and
behind a key that nobody else knows; prompts go in as ids, so that the text is the one that training saw."""

from __future__ import annotations

import json
import os
import secrets
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from typing import Any

from tongwen.errors import MissingPackage, ModelError
from tongwen.infer.decode import Sampling, Take, Voice
from tongwen.language import say

SLOTS = 8  # prompts that are answered side by side


@dataclass(frozen=True)
class LlamaCpp(Voice):
    """A voice whose model is a llama.cpp server."""

    key: str = ""

    def answer_all(self, prompts: Sequence[list[int]], sampling: Sampling, take: Take, rows: int = SLOTS) -> None:
        """The same, SLOTS prompts side by side whatever `rows` says: llama.cpp made room for them when it was opened."""
        for prompt in prompts:
            self._check_fits(prompt, sampling)
        if sampling.beams > 1:
            raise ModelError(say("llama.cpp has no beam search", "llama.cpp 没有束搜索"), remedy="--engine batched")
        with ThreadPoolExecutor(SLOTS) as pool:
            waiting = {pool.submit(self._complete, prompt, sampling): place for place, prompt in enumerate(prompts)}
            try:
                for done in as_completed(waiting):
                    take(waiting[done], self._until_stop(done.result()))
            finally:
                pool.shutdown(cancel_futures=True)

    def _complete(self, prompt: list[int], sampling: Sampling) -> list[int]:
        body = {
            "prompt": prompt,
            "n_predict": self._room_for(len(prompt), sampling).max_new_tokens,
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
                return list(json.load(answer)["tokens"])
        except urllib.error.HTTPError as error:
            raise ModelError(error.read().decode(errors="replace"), place="llama.cpp") from None


def open_file(file: str, tokenizer: Any, stop_ids: tuple[int, ...], context: int) -> LlamaCpp:
    """llama.cpp with a file, its cache for SLOTS prompts of `context` tokens. Raises MissingPackage and ModelError."""
    try:
        import xllamacpp
    except ImportError:
        raise MissingPackage("xllamacpp", "llama.cpp", "llamacpp") from None
    key = secrets.token_urlsafe(24)
    params = xllamacpp.CommonParams()
    params.model.path, params.api_keys = file, [key]
    params.n_ctx, params.n_parallel, params.kv_unified = SLOTS * context, SLOTS, False
    params.warmup, params.verbosity = False, -1
    params.cpuparams.n_threads = int(os.environ.get("OMP_NUM_THREADS", "0")) or os.cpu_count() or 1
    try:
        server = xllamacpp.Server(params)
    except RuntimeError as error:
        raise ModelError(
            say(f"llama.cpp cannot open it: {error}", f"llama.cpp 无法打开：{error}"), place=file
        ) from None
    return LlamaCpp(server, tokenizer, stop_ids, context, key=key)
