"""llama.cpp from the wheels of `xllamacpp`, to check exported GGUF files."""

from __future__ import annotations

import json
import urllib.request
from pathlib import Path
from typing import Any


class LlamaCpp:
    """A loaded GGUF file: ids in, ids out, through a local llama.cpp server."""

    def __init__(self, file: Path, context: int = 512, threads: int = 2) -> None:
        import xllamacpp

        params = xllamacpp.CommonParams()
        params.model.path = str(file)
        params.n_ctx, params.n_parallel, params.n_gpu_layers = context, 1, 0
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32  # half the digits by default
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        params.warmup, params.verbosity, params.cpuparams.n_threads = False, -1, threads
        self._server = xllamacpp.Server(params)

    def encode(self, text: str) -> list[int]:
        body = {"content": text, "add_special": True, "parse_special": True}
        return list(self._post("/tokenize", body)["tokens"])

    def greedy(self, ids: list[int], count: int) -> list[int]:
        """Return up to `count` greedy tokens after these ids."""
        body = {"prompt": ids, "n_predict": count, "temperature": 0, "top_k": 1, "return_tokens": True}
        return list(self._post("/completion", {**body, "cache_prompt": False})["tokens"])

    def _post(self, path: str, body: dict[str, Any]) -> Any:
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(self._server.listening_address + path, json.dumps(body).encode(), headers)
        with urllib.request.urlopen(request, timeout=600) as answer:
            return json.load(answer)
