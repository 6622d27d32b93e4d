"""A model's name that depends on its tensors alone: their names, types, shapes and bytes, not the files they lie in.

Re-sharding, another container, or a copy of the folder leave it unchanged; one flipped bit does not.
"""

from __future__ import annotations

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from tongwen.errors import ModelError
from tongwen.language import say
from tongwen.model.load import Place


def tensor_digest(name: str, dtype: str, shape: tuple[int, ...], data: Any) -> str:
    """One tensor's line in the model's fingerprint. data: its bytes, little-endian and contiguous."""
    digest = hashlib.sha256(f"{name}\0{dtype}\0{','.join(map(str, shape))}\0".encode())
    digest.update(data)
    return digest.hexdigest()


def combine(lines: dict[str, str]) -> str:
    return hashlib.sha256("\n".join(f"{name} {lines[name]}" for name in sorted(lines)).encode()).hexdigest()


def fingerprint_model(place: Place) -> str | None:
    """The fingerprint of a model's files; None for one that is only on a hub and not in the local cache."""
    if place.gguf:
        return combine(_gguf_lines(Path(place.folder) / place.gguf))
    folder = Path(place.folder) if place.local else cached_folder(place.folder)
    if folder is None:
        return None
    files = sorted(folder.glob("*.safetensors"))
    if files:
        with ThreadPoolExecutor() as pool:
            parts = list(pool.map(safetensors_lines, files))
        return combine({name: line for part in parts for name, line in part.items()})
    lines: dict[str, str] = {}
    for file in sorted(folder.glob("pytorch_model*.bin")):
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        lines |= {name: _tensor_line(name, tensor) for name, tensor in state.items()}
    return combine(lines) if lines else None


def fingerprint_stack(base: str, adapter: str) -> str:
    """The name of a base with an adapter's change in its weights, from the fingerprints of both."""
    return hashlib.sha256(f"{base}\0{adapter}".encode()).hexdigest()


def fingerprint_state(state: dict[str, torch.Tensor]) -> str:
    """The fingerprint of tensors in memory: the same as that of a safetensors file that holds them."""
    return combine({name: _tensor_line(name, tensor) for name, tensor in state.items()})


def fingerprint_tokenizer(tokenizer: Any) -> str:
    """sha256 over the tokenizer's complete definition (vocabulary, merges, normaliser, added tokens)."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    text = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def fingerprint_text(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def safetensors_lines(file: Path) -> dict[str, str]:
    """name -> digest of every tensor in a safetensors file, streamed from the file's own bytes.

    Raises ModelError when the file is cut short or its header cannot be read.
    """
    length = file.stat().st_size
    with file.open("rb") as stream:
        size = int.from_bytes(stream.read(8), "little")
        try:
            header: Any = json.loads(stream.read(size)) if 8 + size <= length else None
            spans = {name: facts["data_offsets"] for name, facts in header.items() if name != "__metadata__"}
        except (ValueError, AttributeError, KeyError, TypeError):
            raise _broken(file, say("its header cannot be read", "文件头无法读取")) from None
        if any(8 + size + end > length or begin > end for begin, end in spans.values()):
            raise _broken(file, say(f"it ends after {length} bytes", f"在 {length} 字节处中断"))
        lines = {}
        for name, (begin, end) in spans.items():
            shape = ",".join(map(str, header[name]["shape"]))
            digest = hashlib.sha256(f"{name}\0{header[name]['dtype']}\0{shape}\0".encode())
            stream.seek(8 + size + begin)
            left = end - begin
            while left:
                block = stream.read(min(left, 1 << 22))
                digest.update(block)
                left -= len(block)
            lines[name] = digest.hexdigest()
    return lines


def _broken(file: Path, what: str) -> ModelError:
    return ModelError(
        say(f"the model cannot be loaded: {what}", f"无法加载模型：{what}"),
        place=str(file),
        remedy=say("fetch it again: the file is not whole", "请重新下载：文件不完整"),
    )


def cached_folder(hub_id: str) -> Path | None:
    """The snapshot of a hub model in the local cache."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(hub_id, "config.json")
    return Path(found).parent if isinstance(found, str) else None


_NAMES = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float64: "F64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def _tensor_line(name: str, tensor: torch.Tensor) -> str:
    flat = tensor.detach().cpu().contiguous()
    data = flat.view(torch.uint8).numpy() if flat.dim() else flat.reshape(1).view(torch.uint8).numpy()
    return tensor_digest(name, _NAMES.get(flat.dtype, str(flat.dtype)), tuple(flat.shape), memoryview(data).cast("B"))


def _gguf_lines(file: Path) -> dict[str, str]:
    from gguf import GGUFReader

    return {
        tensor.name: tensor_digest(
            tensor.name,
            tensor.tensor_type.name,
            tuple(int(size) for size in tensor.shape),
            memoryview(tensor.data.tobytes()),
        )
        for tensor in GGUFReader(str(file)).tensors
    }
