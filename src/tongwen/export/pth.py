"""Read and write LLaMA's own format: `consolidated.NN.pth`, `params.json`, `tokenizer.model`.

It differs from a Hugging Face folder in two ways. Each file holds a slice of every matrix, one file per GPU. And the
rows of the query and key projections are ordered by rotation pairs instead of halves, so they are reordered within each
head. When read, a folder of `.pth` files looks like any other model's tensors. Only the requested rows are in memory.
"""

from __future__ import annotations

import io
import json
import math
import pickle
import re
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from tongwen.core.errors import ModelError
from tongwen.core.i18n import _
from tongwen.core.safetensors_io import ITEM_BYTES, TensorSource, blocks

# (Hugging Face's name, LLaMA's name, axis that is sliced over the files; None: each file has the whole tensor)
OUTSIDE = (
    ("model.embed_tokens.weight", "tok_embeddings.weight", 1),
    ("model.norm.weight", "norm.weight", None),
    ("lm_head.weight", "output.weight", 0),
)
INSIDE = (
    ("self_attn.q_proj.weight", "attention.wq.weight", 0),
    ("self_attn.k_proj.weight", "attention.wk.weight", 0),
    ("self_attn.v_proj.weight", "attention.wv.weight", 0),
    ("self_attn.o_proj.weight", "attention.wo.weight", 1),
    ("mlp.gate_proj.weight", "feed_forward.w1.weight", 0),
    ("mlp.down_proj.weight", "feed_forward.w2.weight", 1),
    ("mlp.up_proj.weight", "feed_forward.w3.weight", 0),
    ("input_layernorm.weight", "attention_norm.weight", None),
    ("post_attention_layernorm.weight", "ffn_norm.weight", None),
)
PERMUTED = ("self_attn.q_proj.weight", "self_attn.k_proj.weight")
FILES_BY_WIDTH = {4096: 1, 5120: 2, 6656: 4, 8192: 8}  # 7B, 13B, 33B, 65B and 70B, as published
PARAMS = "params.json"
SCALED = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def names(layers: int) -> Iterator[tuple[str, str, int | None]]:
    """Yield (Hugging Face's name, LLaMA's name, sliced axis) of every tensor."""
    yield OUTSIDE[0]
    for layer in range(layers):
        for hf_name, llama_name, axis in INSIDE:
            yield f"model.layers.{layer}.{hf_name}", f"layers.{layer}.{llama_name}", axis
    yield from OUTSIDE[1:]


def find_files(folder: Path) -> list[Path]:
    """Return the `consolidated.NN.pth` files of a folder. Raises ModelError when one of them is missing."""
    files = sorted(folder.glob("consolidated.*.pth"))
    numbers = [int(re.sub(r"\D", "", file.stem) or 0) for file in files]
    if numbers != list(range(len(files))):
        missing = next(number for number in range(len(files) + 1) if number not in numbers)
        raise ModelError(
            _("part of the model is missing"),
            place=str(folder / f"consolidated.{missing:02d}.pth"),
        )
    return files


class PthTensors:
    """A folder of `.pth` files as a model's tensors, with Hugging Face's names and row order."""

    def __init__(self, parts: Sequence[TensorSource], folder: Path) -> None:
        self.parts, self.params = parts, _read_params(folder)
        self.config = _config(parts, self.params, folder)
        self.facts: dict[str, tuple[str, tuple[int, ...]]] = {}
        self._at: dict[str, tuple[str, int | None]] = {}
        for hf_name, llama_name, axis in names(self.config["num_hidden_layers"]):
            facts = [_fact(part, llama_name, folder) for part in parts]
            if llama_name == "tok_embeddings.weight" and facts[0][1][1] == self.config["hidden_size"]:
                axis = 0  # LLaMA-3 slices the vocabulary instead
            shape = facts[0][1]
            if axis is not None:
                total = sum(fact[1][axis] for fact in facts)
                shape = (total, *shape[1:]) if axis == 0 else (shape[0], total)
            self.facts[hf_name] = (facts[0][0], shape)
            self._at[hf_name] = (llama_name, axis)
        spare = parts[0].facts.keys() - {llama_name for llama_name, _ in self._at.values()}
        if odd := sorted(name for name in spare if not name.endswith("rope.freqs")):
            raise ModelError(_("{name} does not belong to a LLaMA model").format(name=odd[0]), place=str(folder))

    def raw(self, name: str, begin: int, end: int) -> Any:
        if not name.endswith(PERMUTED):
            return self._sliced(name, begin, end)
        width = self.config["head_dim"]  # read whole heads, then reorder their rows
        first, last = begin // width * width, -(-end // width) * width
        rows = self._sliced(name, first, last).reshape(last - first, -1)
        return np.ascontiguousarray(
            rows[head_order(last - first, width, to_halves=True)][begin - first : end - first]
        ).reshape(-1)

    def _sliced(self, name: str, begin: int, end: int) -> Any:
        """Return rows in the files' order, assembled from the parts."""
        llama_name, axis = self._at[name]
        if axis is None:
            return self.parts[0].raw(llama_name, begin, end)
        if axis == 1:
            rows = [part.raw(llama_name, begin, end).reshape(end - begin, -1) for part in self.parts]
            return np.ascontiguousarray(np.concatenate(rows, axis=1)).reshape(-1)
        out, start = [], 0
        for part in self.parts:
            count = part.facts[llama_name][1][0]
            low, high = max(begin - start, 0), min(end - start, count)
            if low < high:
                out.append(part.raw(llama_name, low, high))
            start += count
        return np.concatenate(out)


class UntiedTensors:
    """The same tensors with a separate head: LLaMA's format does not support tied weights."""

    def __init__(self, tensors: TensorSource) -> None:
        self.tensors = tensors
        self.facts = {"lm_head.weight": tensors.facts["model.embed_tokens.weight"], **tensors.facts}

    def raw(self, name: str, begin: int, end: int) -> Any:
        return self.tensors.raw(name if name in self.tensors.facts else "model.embed_tokens.weight", begin, end)


def write(tensors: TensorSource, config: Mapping[str, Any], out: Path, progress: Callable[[int], None]) -> int:
    """Write `consolidated.NN.pth` and `params.json`, in the published number of files; returns that number.

    Raises ModelError for a model that LLaMA's own code cannot run.
    """
    params = make_params(tensors, config)
    tensors = UntiedTensors(tensors)
    files = FILES_BY_WIDTH.get(int(config["hidden_size"]), 1)
    with ExitStack() as stack:
        parts = [stack.enter_context(PthFile(out / f"consolidated.{number:02d}.pth")) for number in range(files)]
        for done, (hf_name, llama_name, axis) in enumerate(names(int(config["num_hidden_layers"])), 1):
            _spread(tensors, hf_name, llama_name, axis, parts, params["dim"] // params["n_heads"])
            progress(done)
    (out / PARAMS).write_text(json.dumps(params), encoding="utf-8")
    return files


def _spread(
    tensors: TensorSource, hf_name: str, llama_name: str, axis: int | None, parts: Sequence[PthFile], width: int
) -> None:
    """Write one tensor to all files, reading its rows once."""
    dtype, shape = tensors.facts[hf_name]
    size, permuted = ITEM_BYTES[dtype], hf_name.endswith(PERMUTED)
    with ExitStack() as stack:
        streams = []
        for number, part in enumerate(parts):
            low, high = (0, 0) if axis is None else _share(shape[axis], number, len(parts))
            local_shape = (
                shape if axis is None else tuple(high - low if at == axis else n for at, n in enumerate(shape))
            )
            streams.append((stack.enter_context(part.member(llama_name, dtype, local_shape)), low, high))
        for begin, end in heads(shape[0], width) if permuted else blocks(shape):
            rows = read_rows(tensors, hf_name, begin, end, width if permuted else 0)
            for stream, low, high in streams:
                if axis == 0:
                    stream.write(memoryview(rows[max(low - begin, 0) : max(high - begin, 0)].reshape(-1)))
                else:
                    chosen: Any = rows if axis is None else np.ascontiguousarray(rows[:, low * size : high * size])
                    stream.write(memoryview(chosen.reshape(-1)))


def heads(rows: int, width: int) -> Iterator[tuple[int, int]]:
    """Yield the rows [begin, end) of each head."""
    for begin in range(0, rows, width):
        yield begin, begin + width


def read_rows(tensors: TensorSource, name: str, begin: int, end: int, width: int) -> Any:
    """Return rows as bytes, (n, bytes per row). width: head width, to order rows by rotation pairs; 0: no reordering."""
    rows = tensors.raw(name, begin, end).reshape(end - begin, -1)
    return np.ascontiguousarray(rows[head_order(end - begin, width, to_halves=False)]) if width else rows


def make_params(tensors: TensorSource, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the content of `params.json`. Raises ModelError that names a feature the format cannot express."""
    wanted = {hf_name for hf_name, _, _ in names(int(config.get("num_hidden_layers", 0)))}
    spare = sorted(tensors.facts.keys() - wanted)
    missing = sorted(wanted - tensors.facts.keys() - {"lm_head.weight"})
    dim, heads = int(config["hidden_size"]), int(config["num_attention_heads"])
    theta, scaling = _rope(config)
    width = int(config.get("head_dim") or dim // heads)
    for unsupported, what in (
        (config.get("model_type") != "llama", f"model_type {config.get('model_type')}"),
        (bool(spare), (spare or [""])[0]),
        (bool(missing), (missing or [""])[0]),
        (width * heads != dim, f"head_dim {width}"),
        (scaling not in (None, "default") and not _is_llama3_1(config), f"rope_scaling {scaling}"),
    ):
        if unsupported:
            raise ModelError(
                _("the original LLaMA format cannot hold this model: {what}").format(what=what),
                place="--to pth",
                remedy="--to hf",
            )
    wide = tensors.facts["model.layers.0.mlp.gate_proj.weight"][1][0]
    params: dict[str, Any] = {"dim": dim, **_feed_forward(dim, wide), "n_heads": heads}
    params |= {"n_layers": int(config["num_hidden_layers"]), "norm_eps": config["rms_norm_eps"], "vocab_size": -1}
    groups = int(config.get("num_key_value_heads") or heads)
    if groups != heads:
        params["n_kv_heads"] = groups
    if theta != 10000.0:
        params["rope_theta"] = theta
    if scaling == "llama3":
        params["use_scaled_rope"] = True
    return params


class PthFile:
    """A torch zip file, written tensor by tensor with streamed data.

    torch.save needs all tensors of a file in memory. Here the pickle of the tensors (`data.pkl`), which is small, comes
    last. Each tensor's bytes are a separate member, aligned to 64 bytes so that it can be memory-mapped.
    """

    def __init__(self, file: Path) -> None:
        self.stream = file.open("wb")
        self.zip = zipfile.ZipFile(self.stream, "w", zipfile.ZIP_STORED)
        self.root = file.stem
        self.tensors: OrderedDict[str, _PickledTensor] = OrderedDict()

    def __enter__(self) -> PthFile:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if error is None:
            stream = io.BytesIO()
            _Pickler(stream, protocol=2).dump(self.tensors)
            for name, content in (("data.pkl", stream.getvalue()), ("byteorder", b"little"), ("version", b"3\n")):
                self.zip.writestr(zipfile.ZipInfo(f"{self.root}/{name}"), content)  # without the time: same bytes twice
        self.zip.close()
        self.stream.close()

    def member(self, name: str, dtype: str, shape: tuple[int, ...]) -> Any:
        """Open a stream for the bytes of one tensor. Close it before opening the next."""
        key = str(len(self.tensors))
        self.tensors[name] = _PickledTensor(_Storage(dtype, key, math.prod(shape)), shape)
        member = zipfile.ZipInfo(f"{self.root}/data/{key}")
        start = self.stream.tell() + 30 + len(member.filename) + 20 + 4  # local header, 64-bit sizes, this field
        padding = -start % 64
        member.extra = struct.pack("<HH", 0x4246, padding) + b"Z" * padding  # "FB", as torch marks its padding
        return self.zip.open(member, "w", force_zip64=True)


class _Storage:
    def __init__(self, dtype: str, key: str, count: int) -> None:
        self.dtype, self.key, self.count = dtype, key, count


class _PickledTensor:
    """Represents a tensor in the pickle. torch rebuilds it from its storage, contiguous."""

    def __init__(self, storage: _Storage, shape: tuple[int, ...]) -> None:
        self.storage, self.shape = storage, shape

    def __reduce__(self) -> Any:
        from torch._utils import _rebuild_tensor_v2

        strides = tuple(math.prod(self.shape[axis + 1 :]) for axis in range(len(self.shape)))
        return _rebuild_tensor_v2, (self.storage, 0, self.shape, strides, False, OrderedDict())


class _Pickler(pickle.Pickler):
    def persistent_id(self, thing: Any) -> Any:
        if not isinstance(thing, _Storage):
            return None
        import torch

        kinds = {
            "F32": torch.FloatStorage,
            "F16": torch.HalfStorage,
            "BF16": torch.BFloat16Storage,
            "F64": torch.DoubleStorage,
        }
        return "storage", kinds[thing.dtype], thing.key, "cpu", thing.count


def _share(total: int, number: int, files: int) -> tuple[int, int]:
    """Return a file's range of an axis: equal parts, with the rest in the last (49,953 in two: 24,976 and 24,977)."""
    part = total // files
    return number * part, total if number == files - 1 else (number + 1) * part


def head_order(rows: int, width: int, *, to_halves: bool) -> Any:
    """Return row indices to reorder heads from rotation pairs (0, 1), (2, 3), ... to halves (0, 2, ..., 1, 3, ...), or
    back."""
    head = np.arange(width)
    head = head.reshape(-1, 2).T.reshape(-1) if to_halves else head.reshape(2, -1).T.reshape(-1)
    return (np.arange(0, rows, width)[:, None] + head).reshape(-1)


def _read_params(folder: Path) -> dict[str, Any]:
    file = folder / PARAMS
    try:
        params = dict(json.loads(file.read_text(encoding="utf-8")))
        for key in ("dim", "n_heads", "n_layers", "norm_eps"):
            if not isinstance(params.get(key), (int, float)) or not 0 < params[key] < 1 << 20:
                raise ModelError(_("{key} is {params!r}").format(key=key, params=params.get(key)), place=str(file))
        return params
    except FileNotFoundError:
        raise ModelError(_("no params.json beside the .pth files"), place=str(folder)) from None
    except (ValueError, TypeError) as error:
        raise ModelError(_("not JSON: {error}").format(error=error), place=str(file)) from None


def _config(parts: Sequence[TensorSource], params: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Return config.json for a LLaMA model. The format has no context length: use that of the matching release."""
    dim, heads = int(params["dim"]), int(params["n_heads"])
    theta = float(params.get("rope_theta", 10000.0))
    wide = sum(_fact(part, "layers.0.feed_forward.w1.weight", folder)[1][0] for part in parts)
    embedding = _fact(parts[0], "tok_embeddings.weight", folder)
    rows = embedding[1][0] * (len(parts) if embedding[1][1] == dim and len(parts) > 1 else 1)
    first = params["norm_eps"] == 1e-6 or (
        dim == 8192 and "n_kv_heads" not in params
    )  # LLaMA-1, 65B being the exception
    length = 8192 if theta > 10000 else 2048 if first else 4096
    config: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": dim,
        "intermediate_size": wide,
        "num_hidden_layers": int(params["n_layers"]),
        "num_attention_heads": heads,
        "num_key_value_heads": int(params.get("n_kv_heads") or heads),
        "head_dim": dim // heads,
        "rms_norm_eps": params["norm_eps"],
        "rope_theta": theta,
        "max_position_embeddings": length,
        "vocab_size": rows,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "dtype": {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}.get(embedding[0], "float32"),
    }
    if params.get("use_scaled_rope"):
        config |= {"rope_scaling": SCALED, "max_position_embeddings": 131072}
    return config


def _fact(part: TensorSource, name: str, folder: Path) -> tuple[str, tuple[int, ...]]:
    if name not in part.facts:
        raise ModelError(_("{name} is missing from a part").format(name=name), place=str(folder))
    return part.facts[name]


def _rope(config: Mapping[str, Any]) -> tuple[float, str | None]:
    """Return (theta, RoPE scaling type), from the config's older or newer keys."""
    found = config.get("rope_parameters") or config.get("rope_scaling") or {}
    theta = config.get("rope_theta") or found.get("rope_theta") or 10000.0
    return float(theta), found.get("rope_type") or found.get("type")


def _is_llama3_1(config: Mapping[str, Any]) -> bool:
    """Whether the RoPE scaling is that of LLaMA 3.1, the only one in LLaMA's code (`use_scaled_rope`)."""
    found = config.get("rope_parameters") or config.get("rope_scaling") or {}
    return {name: found.get(name) for name in SCALED} == SCALED


def _feed_forward(dim: int, wide: int) -> dict[str, Any]:
    """Return `multiple_of` and `ffn_dim_multiplier`, from which LLaMA's code computes this feed-forward width."""
    plain = 8 * dim // 3
    for multiplier in (None, 1.3):
        for multiple in (256, 1024, 4096):
            if -(-int(plain * (multiplier or 1.0)) // multiple) * multiple == wide:
                return {"multiple_of": multiple} | ({"ffn_dim_multiplier": multiplier} if multiplier else {})
    return {"multiple_of": 1, "ffn_dim_multiplier": (wide + 0.5) / plain}
