"""Write tensors to one GGUF file for llama.cpp and Ollama, a few rows at a time, and read it back.

The `gguf` library's quantisers produce F32, F16, BF16, Q8_0 and the older 4- and 5-bit types, llama.cpp's own the K
types (see kquants.py). Tensor names come from the `gguf` library's map. An unverified family, or a tensor that is not in
the map, raises an error.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tongwen.core.errors import MissingPackage, ModelError, NumbersError
from tongwen.core.i18n import _
from tongwen.core.safetensors_io import TensorSource, blocks, row_count
from tongwen.export import kquants
from tongwen.export.gguf_architectures import ARCHITECTURES
from tongwen.export.gguf_metadata import add_metadata, extra_tensors, head_width
from tongwen.export.gguf_vocab import Vocabulary
from tongwen.export.pth import heads, read_rows

TYPES = ("f32", "f16", "bf16", "q8_0", "q4_0", "q4_1", "q5_0", "q5_1")
PERMUTED = (
    "q_proj.weight",
    "k_proj.weight",
    "q_proj.bias",
    "k_proj.bias",
)  # row order of LLaMA's own files, see pth.py
ALWAYS_F32 = ("ffn_gate_inp.weight", "ffn_gate_inp_shexp.weight", "ssm_conv1d.weight", "shortconv.conv.weight")


def check_type(kind: str) -> None:
    """Raise ModelError or MissingPackage for a dtype that cannot be written."""
    _library()
    if kind in kquants.KINDS:
        kquants.check_library()
    elif kind not in TYPES:
        raise ModelError(
            _("unknown GGUF dtype {kind!r}").format(kind=kind),
            place="--quantize",
            remedy=", ".join((*TYPES, *kquants.KINDS)),
        )


def bytes_per_weight(kind: str) -> float:
    """Return the bytes per weight of most tensors in a file of this dtype."""
    gguf = _library()
    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kquants.KINDS.get(kind, kind.upper())]]
    return float(size / block)


def vocabulary_rows(tensors: TensorSource, config: Mapping[str, Any]) -> int:
    """Return the number of rows of the embedding."""
    embedding = next(
        hf_name for hf_name, gguf_name in _names(tensors, config).items() if gguf_name == "token_embd.weight"
    )
    return tensors.facts[embedding][1][0]


def write(
    tensors: TensorSource,
    config: Mapping[str, Any],
    vocabulary: Vocabulary | None,
    template: str | None,
    file: Path,
    kind: str,
    progress: Callable[[int], None],
) -> None:
    """Write a GGUF file of one dtype. config: must have passed `gguf_metadata.check_config`."""
    gguf = _library()
    names, extra = _names(tensors, config), extra_tensors(config)
    writer = gguf.GGUFWriter(path=None, arch=ARCHITECTURES[str(config["model_type"])].name)
    add_metadata(writer, config, _title(config, vocabulary), vocabulary_rows(tensors, config), kind)
    if vocabulary is not None:
        _add_vocabulary(writer, vocabulary, template)
    for name, tensor in extra.items():
        writer.add_tensor_info(name, tensor.shape, tensor.dtype, tensor.nbytes)
    for hf_name, gguf_name in names.items():
        _unused, shape = tensors.facts[hf_name]
        stored = type_of(gguf_name, shape, kind, config)
        nbytes = row_count(shape) * kquants.row_bytes(shape[1] if len(shape) > 1 else 1, stored)
        stored_shape = _stored_shape(gguf_name, shape, config)
        writer.add_tensor_info(
            gguf_name, stored_shape, np.dtype(np.float32), nbytes, raw_dtype=gguf.GGMLQuantizationType[stored]
        )
    writer.write_header_to_file(file)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    (stream,) = writer.fout
    writer.write_padding(stream, stream.tell())
    for tensor in extra.values():
        stream.write(tensor.tobytes())
        writer.write_padding(stream, stream.tell())
    for done, (hf_name, gguf_name) in enumerate(names.items(), 1):
        stored = type_of(gguf_name, tensors.facts[hf_name][1], kind, config)
        for rows in iter_rows(tensors, hf_name, config):
            stream.write(memoryview(_checked(_quantised(rows, stored), stored, hf_name).reshape(-1)))
        writer.write_padding(stream, stream.tell())
        progress(done)
    writer.close()


def _title(config: Mapping[str, Any], vocabulary: Vocabulary | None) -> str:
    """Return the model's name, changed if it would mislead llama.cpp about Phi-3.

    For a name with "phi-3" llama.cpp drops blanks after special tokens, as Phi-3's tokenizer does, and fails when the
    vocabulary lacks Phi-3's tokens.
    """
    title = str(config.get("_name_or_path") or config["model_type"]).rstrip("/").split("/")[-1]
    named_phi3 = any(marker in title.lower() for marker in ("phi-3", "phi3"))
    if vocabulary is None or named_phi3 == vocabulary.drops_blanks:
        return title
    return f"phi-3 {title}" if vocabulary.drops_blanks else "phi"


def check(
    tensors: TensorSource, config: Mapping[str, Any], vocabulary: Vocabulary | None, file: Path, kind: str
) -> None:
    """Read the file back and compare every tensor's shape, type and first, middle and last rows, to the bit.

    Raises NumbersError when they differ.
    """
    gguf = _library()
    reader = gguf.GGUFReader(str(file))
    held = {tensor.name: tensor for tensor in reader.tensors}
    for name in extra_tensors(config):
        held.pop(name)
    for hf_name, gguf_name in _names(tensors, config).items():
        tensor, (_unused, shape) = held.pop(gguf_name, None), tensors.facts[hf_name]
        if tensor is None or tuple(map(int, reversed(tensor.shape))) != _stored_shape(gguf_name, shape, config):
            raise _mismatch(gguf_name, file)
        stored = type_of(gguf_name, shape, kind, config)
        found = tensor.data.reshape(row_count(shape), -1)
        for begin, rows in _some_rows(tensors, hf_name, config):
            expected = _quantised(rows, stored)
            if not np.array_equal(found[begin : begin + len(rows)].view(np.uint8), expected):
                raise _mismatch(gguf_name, file)
    if held:
        raise _mismatch(sorted(held)[0], file)
    if vocabulary is not None:
        written = reader.fields["tokenizer.ggml.tokens"]
        if len(written.data) != len(vocabulary.tokens):
            raise _mismatch("tokenizer.ggml.tokens", file)


def _stored_shape(name: str, shape: tuple[int, ...], config: Mapping[str, Any]) -> tuple[int, ...]:
    """Return a tensor's shape in the file: stacked experts are (experts, rows, columns), DeepSeek's decompression is
    (heads, rows, columns)."""
    if "_exps." in name and len(shape) > 1 and not name.endswith("_exps.bias"):
        count = int(config["num_experts"])
    elif name.endswith(("attn_k_b.weight", "attn_v_b.weight")):
        count = int(config["num_attention_heads"])
    else:
        return shape
    return count, shape[0] // count, shape[1]


def type_of(name: str, shape: tuple[int, ...], kind: str, config: Mapping[str, Any]) -> str:
    """Return the GGUF type of a tensor. name: llama.cpp's name.

    Vectors, routers and short convolutions stay F32. In 4- and 5-bit files the head and the embedding get 8 bits. Rows whose
    length is no multiple of a block stay F16. The K types are mixtures (see kquants.py).
    """
    if len(shape) < 2 or kind == "f32" or name.endswith(ALWAYS_F32):
        return "F32"
    if kind in kquants.KINDS:
        heads = int(config["num_attention_heads"])
        groups = heads // int(config.get("num_key_value_heads") or heads)
        tied = bool(config.get("tie_word_embeddings"))
        mixture = kquants.QuantizationMix(kind, int(config["num_hidden_layers"]), groups, tied)
        return mixture.type_of(name, shape[-1])
    if kind.startswith("q"):
        if shape[-1] % 32:
            return "F16"
        if kind != "q8_0" and name in ("output.weight", "token_embd.weight"):
            return "Q8_0"
    return kind.upper()


def iter_rows(tensors: TensorSource, name: str, config: Mapping[str, Any]) -> Iterator[Any]:
    """Yield a tensor's rows in fp32 in llama.cpp's order, in blocks: (n, columns); (n, 1) for a vector."""
    width = _permuted_width(name, config)
    _unused, shape = tensors.facts[name]
    for begin, end in heads(shape[0], width) if width else blocks(shape):
        yield _fp32(tensors, name, begin, end, config)


def _some_rows(tensors: TensorSource, name: str, config: Mapping[str, Any]) -> Iterator[tuple[int, Any]]:
    """Yield (first row, rows) at the beginning, the middle and the end of a tensor."""
    count, height = row_count(tensors.facts[name][1]), _permuted_width(name, config) or 1
    for begin in sorted({at // height * height for at in (0, count // 2, count - 1)}):
        yield begin, _fp32(tensors, name, begin, begin + height, config)


def _permuted_width(name: str, config: Mapping[str, Any]) -> int:
    """Return the head width for tensors whose rows llama.cpp stores in rotation pairs; else 0."""
    if not ARCHITECTURES[str(config["model_type"])].pairs or not name.endswith(PERMUTED):
        return 0
    return head_width(config)


def _fp32(tensors: TensorSource, name: str, begin: int, end: int, config: Mapping[str, Any]) -> Any:
    gguf = _library()
    rows = read_rows(tensors, name, begin, end, _permuted_width(name, config))
    numbers = gguf.quants.dequantize(rows, gguf.GGMLQuantizationType[tensors.facts[name][0]])
    shifted = ARCHITECTURES[str(config["model_type"])].shifted
    if shifted and re.search(shifted, name):
        return numbers + np.float32(1)  # these norms scale by 1 + weight, llama.cpp's by the weight in the file
    if name.endswith(".A_log"):
        return -np.exp(numbers)
    return numbers


def _quantised(rows: Any, stored: str) -> Any:
    """Return the quantised rows as bytes, (n, bytes per row)."""
    if stored.endswith("_K"):
        return kquants.quantise(rows, stored)
    gguf = _library()
    with np.errstate(over="ignore"):
        out = gguf.quants.quantize(np.ascontiguousarray(rows, np.float32), gguf.GGMLQuantizationType[stored])
    return np.ascontiguousarray(out).view(np.uint8).reshape(len(rows), -1)


def _checked(data: Any, stored: str, name: str) -> Any:
    if stored == "F16" and not np.isfinite(data.view(np.float16)).all():
        raise NumbersError(_("a number exceeds the range of f16"), place=name, remedy="--quantize bf16")
    return data


def check_tensors(tensors: TensorSource, config: Mapping[str, Any]) -> None:
    """Raise ModelError for a tensor without a llama.cpp name, or with a dtype other than fp32, fp16 and bf16."""
    _names(tensors, config)


def _names(tensors: TensorSource, config: Mapping[str, Any]) -> dict[str, str]:
    """Return transformers' name -> llama.cpp's. Raises ModelError for a tensor without one."""
    gguf = _library()
    architecture = ARCHITECTURES[str(config["model_type"])].name
    if odd := sorted({dtype for dtype, _ in tensors.facts.values()} - {"F32", "F16", "BF16"}):
        raise ModelError(_("weights of type {dtype}").format(dtype=odd[0]), place="--to gguf", remedy="--to hf")
    arch = next(one for one, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    known = gguf.get_tensor_name_map(arch, int(config["num_hidden_layers"]))
    out = {}
    for name in tensors.facts:
        known_as = name.removeprefix("transformer.") if architecture == "bloom" else name  # as in its files on the hub
        gguf_name = known.get_name(known_as, try_suffixes=(".weight", ".bias", ".scale"))
        if gguf_name is None:
            raise ModelError(_("llama.cpp has no name for {name}").format(name=name), place="--to gguf")
        out[name] = gguf_name
    return out


def _add_vocabulary(writer: Any, vocabulary: Vocabulary, template: str | None) -> None:
    writer.add_tokenizer_model(vocabulary.kind)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    if vocabulary.kind == "llama":
        writer.add_token_scores(vocabulary.scores)
        writer.add_add_space_prefix(vocabulary.add_space)
    else:
        writer.add_token_merges(vocabulary.merges)
    for name, index in vocabulary.special.items():
        getattr(writer, f"add_{name}_token_id")(index)
    writer.add_add_bos_token(vocabulary.add_bos)
    writer.add_add_eos_token(False)
    if template:
        writer.add_chat_template(template)


def _mismatch(name: str, file: Path) -> NumbersError:
    return NumbersError(
        _("read back from the file, {name} differs from the tensor written").format(name=name),
        place=str(file),
        remedy=_("the disk or the memory may be failing; try again"),
    )


def _library() -> Any:
    try:
        import gguf
    except ImportError:
        raise MissingPackage("gguf", _("writing GGUF files"), "gguf") from None
    return gguf
