"""Fingerprints: a hash of a model's tensors (names, dtypes, shapes, bytes) that does not depend on its files.

Re-sharding, another file format or a copy of the folder leave it unchanged; one flipped bit changes it.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from blake3 import blake3

from tongwen.core.safetensors_io import TensorLocation, TensorSource, blocks, find_tensors, iter_bytes
from tongwen.model.loading.locate import cached_folder
from tongwen.model.loading.model_ref import ModelRef
from tongwen.model.loading.tensors import TorchTensors, load_bin


def start_digest(name: str, dtype: str, shape: tuple[int, ...]) -> Any:
    """Start the digest of one tensor's line; the caller adds its bytes, little-endian and contiguous.

    BLAKE3 takes a third of SHA-256's time, and every byte of a model is hashed here.
    """
    return blake3(f"{name}\0{dtype}\0{','.join(map(str, shape))}\0".encode())


def combine(lines: dict[str, str]) -> str:
    return hashlib.sha256("\n".join(f"{name} {lines[name]}" for name in sorted(lines)).encode()).hexdigest()


def fingerprint_chain(base: str, adapter: str) -> str:
    """Return the fingerprint of a base with an adapter on it, from the fingerprints of the two."""
    return hashlib.sha256(f"{base}\0{adapter}".encode()).hexdigest()


def fingerprint_model(ref: ModelRef) -> str | None:
    """Return the fingerprint of a model's files; None for a hub model that is not in the local cache."""
    lines = tensor_digests(ref)
    return combine(lines) if lines else None


def tensor_digests(ref: ModelRef) -> dict[str, str]:
    """Return tensor -> its line of the fingerprint; empty for a model that is not on this machine."""
    if ref.gguf:
        return _gguf_lines(Path(ref.folder) / ref.gguf)
    folder = Path(ref.folder) if ref.is_local else cached_folder(ref.folder)
    if folder is None:
        return {}
    if stored := find_tensors(folder):
        with ThreadPoolExecutor() as pool:
            return dict(zip(stored, pool.map(digest_of, stored.values()), strict=True))
    lines: dict[str, str] = {}
    for file in sorted(folder.glob("pytorch_model*.bin")):
        lines |= digests_of(TorchTensors(load_bin(file)))
    return lines


def digests_of(tensors: TensorSource) -> dict[str, str]:
    """Like `tensor_digests`, for any `TensorSource`: tensors in memory give the same lines as their file."""
    lines = {}
    for name, (dtype, shape) in tensors.facts.items():
        digest = start_digest(name, dtype, shape)
        for rows in blocks(shape):
            digest.update(tensors.raw(name, *rows))
        lines[name] = digest.hexdigest()
    return lines


def fingerprint_state(state: dict[str, Any]) -> str:
    """Return the fingerprint of torch tensors in memory: the same as that of a safetensors file with these tensors."""
    return combine(digests_of(TorchTensors(state)))


def fingerprint_tokenizer(tokenizer: Any) -> str:
    """Return sha256 over the tokenizer's complete definition (vocabulary, merges, normaliser, added tokens)."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    text = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def fingerprint_text(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def order_that_fits(base: str, adapters: Sequence[tuple[str | None, str]]) -> tuple[int, ...] | None:
    """Return the order in which each adapter was trained on those below it; None if there is no such order.

    adapters: (recorded fingerprint of its base, its own fingerprint). One without a recorded base fits anywhere.
    """
    for order in itertools.permutations(range(len(adapters))):
        below = base
        for index in order:
            recorded, fingerprint = adapters[index]
            if recorded not in (None, below):
                break
            below = fingerprint_chain(below, fingerprint)
        else:
            return order
    return None


def digest_of(stored: TensorLocation) -> str:
    """Return one tensor's line, from its bytes in the file."""
    digest = start_digest(stored.name, stored.dtype, stored.shape)
    for block in iter_bytes(stored):
        digest.update(block)
    return str(digest.hexdigest())


def _gguf_lines(file: Path) -> dict[str, str]:
    from gguf import GGUFReader

    lines = {}
    for tensor in GGUFReader(str(file)).tensors:
        digest = start_digest(tensor.name, tensor.tensor_type.name, tuple(int(size) for size in tensor.shape))
        digest.update(memoryview(tensor.data.tobytes()))
        lines[tensor.name] = str(digest.hexdigest())
    return lines
