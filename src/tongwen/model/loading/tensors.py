"""Read a model's tensors by name from safetensors files, `.bin` files, or a model in memory.

All share one interface (`core.safetensors_io.TensorSource`). Numbers are computed in fp32 with numpy. torch is imported only
for formats that need it, because the import costs more memory than a merge.
"""

from __future__ import annotations

import errno
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tongwen.core import console
from tongwen.core.artifact import read_json
from tongwen.core.errors import ModelError
from tongwen.core.i18n import _
from tongwen.core.safetensors_io import (
    TensorLocation,
    TensorSource,
    describe_wrong_file,
    find_tensors,
    read_index,
    row_bytes,
    row_count,
)
from tongwen.model.loading import limits
from tongwen.model.loading.config_json import check_unquantised
from tongwen.model.loading.load import load_model
from tongwen.model.loading.model_ref import ModelRef

FLOATS = {"F64", "F32", "F16", "BF16"}
BUFFERS = ("rotary_emb.inv_freq", "attn.masked_bias")  # non-weights in old files; models recompute them
Array = Any  # a numpy array


class FileTensors:
    """Tensors of safetensors files, read by position. Thread-safe."""

    def __init__(self, stored: Mapping[str, TensorLocation]) -> None:
        self.stored = dict(stored)
        self.facts = {name: (one.dtype, one.shape) for name, one in stored.items()}

    def raw(self, name: str, begin: int, end: int) -> Array:
        one = self.stored[name]
        row = row_bytes(one.dtype, one.shape)
        with one.file.open("rb", buffering=0) as stream:
            stream.seek(one.begin + begin * row)
            out: Array = np.empty((end - begin) * row, np.uint8)
            if stream.readinto(out) != out.nbytes:
                raise ModelError(_("the file ends early"), place=str(one.file))
        return out


class TorchTensors:
    """Torch tensors: memory-mapped `.bin` files, or a model in memory."""

    def __init__(self, state: Mapping[str, Any]) -> None:
        self.state = {name: tensor.detach() for name, tensor in state.items()}
        self.facts = {
            name: (torch_name(tensor.dtype), tuple(int(size) for size in tensor.shape))
            for name, tensor in self.state.items()
        }

    def raw(self, name: str, begin: int, end: int) -> Array:
        import torch

        rows = self.state[name].reshape(-1) if self.state[name].dim() < 2 else self.state[name]
        return rows[begin:end].contiguous().reshape(-1).view(torch.uint8).numpy()


def open_tensors(folder: Path, pattern: str) -> TensorSource:
    """Open a folder's safetensors files, else its `.bin` files that match `pattern`. Raises ModelError without any."""
    if stored := find_tensors(folder):
        return FileTensors(stored)
    state: dict[str, Any] = {}
    index = folder / "pytorch_model.bin.index.json"
    mapped = read_index(index) if index.is_file() else {}
    for file in [folder / name for name in sorted(set(mapped.values()))] or sorted(folder.glob(pattern)):
        state |= load_bin(file)
    if not state and not any(folder.glob("*.safetensors")) and not any(folder.glob(pattern)):
        raise ModelError(
            _("no weights in this folder"),
            place=str(folder),
            remedy=_("it needs *.safetensors or {pattern}").format(pattern=pattern),
        )
    return TorchTensors(state)


def open_model(ref: ModelRef) -> tuple[TensorSource, dict[str, Any]]:
    """Return a model's tensors and its config. A GGUF file is de-quantised in memory, with a notice.

    Raises ModelError for an unreadable config and for a quantised model, whose tensors are not its weights.
    """
    if ref.gguf:
        import torch

        console.notice(_("de-quantising the GGUF file: the whole model is loaded into memory"))
        model = load_model(ref, torch.float32)
        state = dict(model.state_dict())
        if model.config.tie_word_embeddings:
            state.pop("lm_head.weight", None)
        config = json.loads(model.config.to_json_string())  # only values that differ from the family's defaults
        return TorchTensors(state), {**config, "architectures": [type(model).__name__]}
    file = Path(ref.folder) / "config.json"
    config = read_json(file)
    limits.check_config(Path(ref.folder))
    check_unquantised(ref, config)
    tensors = open_tensors(Path(ref.folder), "pytorch_model*.bin")
    tensors.facts = {name: fact for name, fact in tensors.facts.items() if not name.endswith(BUFFERS)}
    return tensors, config


def load_bin(file: Path) -> dict[str, Any]:
    """Memory-map the tensors of a torch file. Raises ModelError for a file with anything else; no code in it runs."""
    import torch

    if what := describe_wrong_file(file):
        raise ModelError(what, place=str(file), remedy=_("fetch the file again"))
    try:
        state = _load(file, mmap=True)
    except RuntimeError:  # torch's format of before 2020 cannot be mapped
        state = _load(file, mmap=False)
    if not isinstance(state, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in state.values()):
        raise ModelError(_("it contains more than tensors"), place=str(file))
    size = file.stat().st_size
    for name, tensor in state.items():
        if not isinstance(name, str) or tensor.layout != torch.strided:
            raise ModelError(_("{name!r} is not a plain tensor").format(name=name), place=str(file))
        if tensor.numel() * tensor.element_size() > size:  # a stride of 0 or a compressed archive
            raise ModelError(_("{name} claims more bytes than the file has").format(name=name), place=str(file))
    return state


def _load(file: Path, *, mmap: bool) -> Any:
    import pickle

    import torch

    try:
        return torch.load(file, map_location="cpu", weights_only=True, mmap=mmap)
    except (pickle.UnpicklingError, EOFError, ValueError, AttributeError, KeyError, TypeError) as error:
        raise ModelError(
            _("it cannot be read as plain tensors: {error}").format(error=(str(error).splitlines() or [""])[0][:120]),
            place=str(file),
            remedy=_("tongwen never opens a file that needs to run code; use safetensors"),
        ) from None
    except (RuntimeError, OSError) as error:
        if isinstance(error, OSError) and error.errno != errno.EINVAL:  # torch seeks before the start of a cut file
            raise
        if mmap and isinstance(error, RuntimeError):
            raise
        raise ModelError(
            _("it cannot be read: {error}").format(error=str(error).splitlines()[0][:160]),
            place=str(file),
            remedy=_("download the file again: it is incomplete"),
        ) from None


def to_fp32(raw: Array, dtype: str) -> Array:
    """Convert raw bytes to flat fp32 numbers. Raises KeyError for a dtype that is not a plain float."""
    if dtype == "BF16":
        out = raw.view(np.uint16).astype(np.uint32)
        out <<= 16
        return out.view(np.float32)
    return raw.view({"F32": np.float32, "F16": np.float16, "F64": np.float64}[dtype]).astype(np.float32)


def from_fp32(numbers: Array, dtype: str) -> Array:
    """Round finite fp32 numbers once to a dtype (to nearest, ties to even) and return the raw bytes."""
    flat = np.ascontiguousarray(numbers, dtype=np.float32).reshape(-1)
    if dtype == "BF16":
        bits = flat.view(np.uint32)
        rounded = np.right_shift(bits, 16)
        rounded &= 1
        rounded += bits
        rounded += 0x7FFF
        rounded >>= 16
        return rounded.astype(np.uint16).view(np.uint8)
    with np.errstate(over="ignore"):
        return flat.astype({"F32": np.float32, "F16": np.float16, "F64": np.float64}[dtype]).view(np.uint8)


def read_fp32(tensors: TensorSource, name: str, begin: int = 0, end: int | None = None) -> Array:
    """Return rows [begin, end) of a tensor as fp32, in its shape."""
    dtype, shape = tensors.facts[name]
    if dtype not in FLOATS:
        raise ModelError(
            _("{name} is of type {dtype}, which no weight has").format(name=name, dtype=dtype),
            remedy=_("use the original, unquantised model: an adapter fits both"),
        )
    end = row_count(shape) if end is None else end
    return to_fp32(tensors.raw(name, begin, end), dtype).reshape(end - begin, *shape[1:])


def is_finite(numbers: Array) -> bool:
    """Return whether no number is NaN or Inf. The sum of squares is a fast test; if it overflows, check each number."""
    flat = numbers.reshape(-1)
    with np.errstate(over="ignore", invalid="ignore"):
        return bool(np.isfinite(np.dot(flat, flat))) or bool(np.isfinite(flat).all())


def torch_name(dtype: Any) -> str:
    """Return safetensors' name for a torch dtype: torch.bfloat16 -> BF16."""
    names = {"float": "F", "bfloat": "BF", "int": "I", "uint": "U"}
    text = str(dtype).removeprefix("torch.")
    kind = text.rstrip("0123456789")
    return "BOOL" if text == "bool" else names.get(kind, kind) + text.removeprefix(kind)
