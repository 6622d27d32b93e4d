"""Rearrange tensors for llama.cpp without a copy: rows are assembled from rows of other tensors as they are read.

Every tensor is a matrix here: stacked experts are (experts x rows, columns). BLOOM and GPT-NeoX interleave query, key
and value head by head, but llama.cpp expects all queries first. GPT-2 stores transposed matrices. Experts are stored
separately or as gate and up in one. DeepSeek decompresses keys and values by one matrix. Linear attention repeats its
key heads in another order than llama.cpp. Baichuan-7B is a LLaMA with its three projections in one matrix.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from math import prod
from typing import Any, NamedTuple

import numpy as np

from tongwen.core.errors import ModelError
from tongwen.core.i18n import _
from tongwen.core.model_families import FAMILIES
from tongwen.core.safetensors_io import ITEM_BYTES, TensorSource
from tongwen.export.gguf_architectures import ARCHITECTURES, Config, Cut
from tongwen.export.gguf_metadata import check_family

# LLaMA's config key -> other families' keys for the same value.
SHAPE = {
    "hidden_size": ("n_embd",),
    "num_hidden_layers": ("n_layer",),
    "num_attention_heads": ("n_head",),
    "intermediate_size": ("n_inner",),
    "max_position_embeddings": ("n_positions", "seq_length"),
    "num_experts": ("num_local_experts", "n_routed_experts", "moe_num_experts"),
}
HEADS = ("lm_head.weight", "embed_out.weight")  # not used if the head is tied
LAYER = re.compile(r"model\.layers\.(\d+)\.")  # some files have extra layers, for multi-token prediction
AHEAD = re.compile(r"(^|\.)mtp[._]")  # others name those layers so
WRAPPED = re.compile(r"^(model\.)?language_model\.(model\.)?")  # the text part of a wrapped model
RENAMED = {  # names for which `gguf` has others
    r"e_score_correction_bias$": "e_score_correction.bias",
    r"linear_attn\.dt_bias$": "linear_attn.dt_proj.bias",
    r"experts\.(down|gate_up)_proj$": r"experts.\1_proj.weight",
}


class RowRange(NamedTuple):
    """Rows [begin, end) of a tensor."""

    name: str
    begin: int
    end: int


class Matrices:
    """A source's tensors under other names, as matrices or vectors, without those that the file does not get."""

    def __init__(self, source: TensorSource, names: Mapping[str, str]) -> None:
        self.source, self.names = source, dict(names)
        self.facts = {name: _as_matrix(*source.facts[stored]) for name, stored in names.items()}

    def raw(self, name: str, begin: int, end: int) -> Any:
        stored = self.names[name]
        dtype, shape = self.source.facts[stored]
        height = prod(shape[1:-1])  # rows of the matrix, or numbers of the vector, per row of the source
        width = ITEM_BYTES[dtype] * shape[-1]
        if len(shape) > 1 and len(self.facts[name][1]) == 1:
            height, width = shape[-1], ITEM_BYTES[dtype]
        if height == 1 or len(shape) < 2:
            return self.source.raw(stored, begin, end)
        first, last = begin // height, -(-end // height)
        rows = self.source.raw(stored, first, last)
        return rows[(begin - first * height) * width : (end - first * height) * width]


def _as_matrix(dtype: str, shape: tuple[int, ...]) -> tuple[str, tuple[int, ...]]:
    rows = prod(shape[:-1])
    return dtype, (rows, shape[-1]) if rows > 1 else shape[-1:]


class ReorderedTensors:
    """A source's tensors, some of them assembled from runs of rows of others.

    transposed: tensors to transpose, each of their runs separately, or the whole tensor if it has no runs
    hidden:     tensors of the source to leave out
    columns:    tensor -> its columns, as a slice or a list, before it is transposed; all others have all columns
    """

    def __init__(
        self,
        source: TensorSource,
        runs: Mapping[str, Sequence[RowRange]],
        transposed: Sequence[str] = (),
        hidden: Sequence[str] = (),
        columns: Mapping[str, Any] | None = None,
    ) -> None:
        self.source, self.transposed, self.columns = source, set(transposed), dict(columns or {})
        whole = {*transposed, *self.columns} - set(runs)
        self.runs = {**runs, **{name: [RowRange(name, 0, source.facts[name][1][0])] for name in whole}}
        self.facts = {name: facts for name, facts in source.facts.items() if name not in hidden}
        for name, parts in self.runs.items():
            dtype, shape = source.facts[parts[0].name]
            rows = sum(self._height(name, part) for part in parts)
            width = (parts[0].end - parts[0].begin,) if name in self.transposed else self._width(name, shape)
            self.facts[name] = (dtype, (rows, *width))

    def _width(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        return (len(np.arange(shape[1])[self.columns[name]]),) if name in self.columns else shape[1:]

    def _height(self, name: str, run: RowRange) -> int:
        """Return the number of rows that a run makes."""
        return self._width(name, self.source.facts[run.name][1])[0] if name in self.transposed else run.end - run.begin

    def raw(self, name: str, begin: int, end: int) -> Any:
        if name not in self.runs:
            return self.source.raw(name, begin, end)
        parts, at = [], 0
        for run in self.runs[name]:
            height = self._height(name, run)
            low, high = max(begin - at, 0), min(end - at, height)
            if low < high and name in self.transposed:
                items = self._items(name, run, run.begin, run.end)
                parts.append(np.ascontiguousarray(items[:, low:high].swapaxes(0, 1)).reshape(-1))
            elif low < high:
                parts.append(self._items(name, run, run.begin + low, run.begin + high).reshape(-1))
            at += height
        return np.concatenate(parts)

    def _items(self, name: str, run: RowRange, begin: int, end: int) -> Any:
        """Return rows of a run's source: (rows, columns, bytes per number)."""
        dtype, _shape = self.source.facts[run.name]
        items = self.source.raw(run.name, begin, end).reshape(end - begin, -1, ITEM_BYTES[dtype])
        return items[:, self.columns[name]] if name in self.columns else items


def with_llama_keys(config: Mapping[str, Any], folder: str = "MODEL") -> dict[str, Any]:
    """Return a config with its family's defaults, which files may omit, and LLaMA's keys for the model's shape; of a
    wrapped model the config of its text part.

    Raises ModelError for a family whose GGUF has not been verified, and transformers' own errors for a contradictory
    config.
    """
    from transformers import AutoConfig

    kind = str(config.get("model_type"))
    full = type(AutoConfig.for_model(kind)).from_dict(dict(config)) if kind in _known() else None
    if full is not None and full.get_text_config() is not full:
        text = full.get_text_config()
        tied = text.tie_word_embeddings or full.tie_word_embeddings
        config = {**(config.get("text_config") or {}), "model_type": text.model_type, "tie_word_embeddings": tied}
        kind, full = text.model_type, text
    check_family(kind, folder)
    assert full is not None
    whole = {**config, **full.to_dict()}
    for key, aliases in SHAPE.items():
        for alias in aliases:
            if whole.get(key) is None and whole.get(alias) is not None:
                whole[key] = whole[alias]
    whole["intermediate_size"] = whole.get("intermediate_size") or 4 * int(whole["hidden_size"])
    if kind == "bloom":
        whole.setdefault("max_position_embeddings", 2048)  # BLOOM's training length; ALiBi itself has no limit
    return whole


def _known() -> Any:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    return CONFIG_MAPPING


def text_names(names: Iterable[str]) -> dict[str, str]:
    """Return the text part's tensors: the name that a text model's file would have -> the name in this file."""
    names = list(names)
    if any(WRAPPED.match(name) for name in names):
        names = [name for name in names if WRAPPED.match(name) or name in HEADS]
    named = {}
    for name in names:
        text = WRAPPED.sub("model.", name)
        text = text.replace("model.lm_head.", "lm_head.")
        if not AHEAD.search(text):
            named[text] = name
    return named


def for_llama_cpp(tensors: TensorSource, config: Mapping[str, Any]) -> TensorSource:
    """Return the text part's tensors in llama.cpp's layout, without those that the model does not use."""
    kind, layers = str(config["model_type"]), int(config["num_hidden_layers"])
    architecture, names = ARCHITECTURES[kind], text_names(tensors.facts)
    if config.get("tie_word_embeddings"):
        names = {name: stored for name, stored in names.items() if name not in HEADS}
    kept = {}
    for name, stored in names.items():
        ahead = (found := LAYER.match(name)) and int(found[1]) >= layers
        if not ahead and not (architecture.dropped and re.search(architecture.dropped, name)):
            kept[name] = stored
    tensors = Matrices(tensors, kept)
    if kind in ("bloom", "gpt_neox"):
        count = int(config["num_attention_heads"])
        width = int(config["hidden_size"]) // count
        fused = [name for name in tensors.facts if ".query_key_value." in name]
        order = [3 * head + part for part in range(3) for head in range(count)]
        return ReorderedTensors(
            tensors, {name: [RowRange(name, width * at, width * (at + 1)) for at in order] for name in fused}
        )
    if config.get("num_experts"):
        experts = int(config["num_experts"])
        tensors = _stacked(tensors, experts)
        for cut in architecture.cuts:
            tensors = _taken_apart(tensors, cut, experts)
    if architecture.name == "deepseek2":
        tensors = _decompressed(tensors, config)
    if config.get("linear_num_value_heads"):
        tensors = _linear_attention(tensors, config)
    if kind in FAMILIES and FAMILIES[kind].transposed:
        matrices = [name for name in tensors.facts if name.split(".")[-2] in ("c_attn", "c_proj", "c_fc")]
        tensors = ReorderedTensors(tensors, {}, [name for name in matrices if len(tensors.facts[name][1]) == 2])
    return Matrices(tensors, {_renamed(name, architecture.renamed): name for name in tensors.facts})


def _renamed(name: str, patterns: Mapping[str, str]) -> str:
    for pattern, other in {**RENAMED, **patterns}.items():
        name = re.sub(pattern, other, name)
    return name


def _stacked(tensors: TensorSource, experts: int) -> ReorderedTensors:
    """Concatenate each layer's separate experts: (experts x rows, columns)."""
    runs = {}
    alone = [name for name in tensors.facts if re.search(r"\.experts\.\d+\.", name)]
    for name in alone:
        layer, _unused, rest = name.partition(".experts.")
        expert, _unused2, part = rest.partition(".")
        if expert == "0":
            each = [f"{layer}.experts.{index}.{part}" for index in range(experts)]
            runs[f"{layer}.experts.{part}"] = [RowRange(one, 0, tensors.facts[one][1][0]) for one in each]
    return ReorderedTensors(tensors, runs, hidden=alone)


def _taken_apart(tensors: TensorSource, cut: Cut, experts: int) -> ReorderedTensors:
    """Return the tensors with each one that a cut names replaced by its parts."""
    runs: dict[str, list[RowRange]] = {}
    transposed, columns = [], {}
    whole = [name for name in tensors.facts if name.endswith(cut.end)]
    count = len(cut.into)
    for name in whole:
        rows, width = tensors.facts[name][1]
        height = rows // (1 if "shared" in cut.end else experts)  # of one expert
        for at, end in enumerate(cut.into):
            part = name.removesuffix(cut.end) + end + ("" if "." in end.split("experts.")[-1] else ".weight")
            share = width // count
            if cut.transposed or cut.interleaved:
                columns[part] = slice(at, None, count) if cut.interleaved else slice(share * at, share * (at + 1))
                runs[part] = [RowRange(name, begin, begin + height) for begin in range(0, rows, height)]
                transposed += [part] if cut.transposed else []
            else:
                share = height // count
                begins = range(share * at, rows, height)
                runs[part] = [RowRange(name, begin, begin + share) for begin in begins]
    return ReorderedTensors(tensors, runs, transposed, whole, columns)


def _linear_attention(tensors: TensorSource, config: Config) -> ReorderedTensors:
    """Order the heads of gated delta attention as llama.cpp does.

    Qwen3-Next keeps queries, keys, values and gates of a key head together; llama.cpp has all queries first, and the
    gates as a matrix of their own. Qwen3.5 repeats each key head for the value heads that follow one another; llama.cpp
    repeats the whole row of key heads.
    """
    keys, values = int(config["linear_num_key_heads"]), int(config["linear_num_value_heads"])
    key, value = int(config["linear_key_head_dim"]), int(config["linear_value_head_dim"])
    each, group = values // keys, 2 * key + 2 * values // keys * value
    runs, hidden, columns = {}, [], {}
    for name in tensors.facts:
        stem, _unused, end = name.rpartition("in_proj_qkvz")
        if stem:
            spans = [(0, key), (key, 2 * key), (2 * key, 2 * key + each * value)]
            runs[f"{stem}in_proj_qkv{end}"] = [
                RowRange(name, group * head + low, group * head + high) for low, high in spans for head in range(keys)
            ]
            runs[f"{stem}in_proj_z{end}"] = [
                RowRange(name, group * head + spans[2][1], group * (head + 1)) for head in range(keys)
            ]
            hidden.append(name)
    if hidden:
        return ReorderedTensors(tensors, runs, hidden=hidden)
    order = [head * each + at for at in range(each) for head in range(keys)]  # of the value heads
    for name, (_dtype, shape) in tensors.facts.items():
        _layer, _unused, part = name.partition(".linear_attn.")
        if part.startswith("out_proj."):
            columns[name] = [value * head + column for head in order for column in range(value)]
        elif part.startswith(("in_proj_qkv.", "conv1d.")):
            begin = 2 * keys * key
            parts = [RowRange(name, begin + value * head, begin + value * (head + 1)) for head in order]
            runs[name] = [RowRange(name, 0, begin), *parts]
        elif part.startswith(("in_proj_z.", "in_proj_a.", "in_proj_b.", "A_log", "dt_bias")):
            width = shape[0] // values
            runs[name] = [RowRange(name, width * head, width * (head + 1)) for head in order]
    return ReorderedTensors(tensors, runs, columns=columns)


def _decompressed(tensors: TensorSource, config: Mapping[str, Any]) -> ReorderedTensors:
    """Split DeepSeek's decompression into one matrix for keys, transposed head by head, and one for values."""
    key, value = int(config["qk_nope_head_dim"]), int(config["v_head_dim"])
    begins = range(0, int(config["num_attention_heads"]) * (key + value), key + value)
    fused = [name for name in tensors.facts if name.endswith(".kv_b_proj.weight")]
    keys = {n.replace("kv_b", "k_b"): [RowRange(n, begin, begin + key) for begin in begins] for n in fused}
    values = {
        n.replace("kv_b", "v_b"): [RowRange(n, begin + key, begin + key + value) for begin in begins] for n in fused
    }
    return ReorderedTensors(tensors, {**keys, **values}, transposed=list(keys), hidden=fused)


def as_llama(tensors: TensorSource, config: Mapping[str, Any], place: str) -> tuple[TensorSource, dict[str, Any]]:
    """Return a Baichuan-7B's tensors and config as a LLaMA. Raises ModelError for other Baichuan models."""
    packed = [name for name in tensors.facts if name.endswith(".W_pack.weight")]
    if "model_max_length" in config or not packed:  # only the 13B models have this key: they use ALiBi
        raise ModelError(
            _("this Baichuan uses ALiBi positions: it does not have the LLaMA architecture"),
            place=place,
            remedy=_("use a Baichuan-7B, or Qwen3"),
        )
    if int(config["vocab_size"]) > 100_000:
        raise ModelError(
            _("Baichuan2 normalises its head; LLaMA does not"),
            place=place,
            remedy=_("use a Baichuan-7B, or Qwen3"),
        )
    runs = {}
    for name in packed:
        third = tensors.facts[name][1][0] // 3
        for at, part in enumerate("qkv"):
            runs[name.replace("W_pack", f"{part}_proj")] = [RowRange(name, third * at, third * (at + 1))]
    out = {key: value for key, value in config.items() if key not in ("auto_map", "tokenizer_class")}
    out |= {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    return ReorderedTensors(
        tensors, runs, hidden=[*packed, *(n for n in tensors.facts if n.endswith("rotary_emb.inv_freq"))]
    ), out
