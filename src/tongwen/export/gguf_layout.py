"""Rearrange tensors for llama.cpp without a copy: rows are assembled from rows of other tensors as they are read.

BLOOM and GPT-NeoX interleave query, key and value head by head, but llama.cpp expects all queries first. GPT-2 stores
transposed matrices. Qwen3 and DeepSeek store each expert separately. DeepSeek decompresses keys and values by one
matrix. Baichuan-7B is a LLaMA with its three projections in one matrix.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from tongwen.core.errors import ModelError
from tongwen.core.i18n import _
from tongwen.core.model_families import FAMILIES
from tongwen.core.safetensors_io import TensorSource
from tongwen.export.gguf_metadata import check_family

# LLaMA's config key -> other families' keys for the same value.
SHAPE = {
    "hidden_size": ("n_embd",),
    "num_hidden_layers": ("n_layer",),
    "num_attention_heads": ("n_head",),
    "intermediate_size": ("n_inner",),
    "max_position_embeddings": ("n_positions", "seq_length"),
    "num_experts": ("num_local_experts", "n_routed_experts"),
}
HEADS = ("lm_head.weight", "embed_out.weight")  # not used if the head is tied
LAYER = re.compile(r"model\.layers\.(\d+)\.")  # DeepSeek's files have extra layers, for multi-token prediction


class RowRange(NamedTuple):
    """Rows [begin, end) of a tensor."""

    name: str
    begin: int
    end: int


class ReorderedTensors:
    """A source's tensors, some of them assembled from runs of rows of others.

    transposed: tensors to transpose, each of their runs separately, or the whole tensor if it has no runs
    hidden:     tensors of the source to leave out
    """

    def __init__(
        self,
        source: TensorSource,
        runs: Mapping[str, Sequence[RowRange]],
        transposed: Sequence[str] = (),
        hidden: Sequence[str] = (),
    ) -> None:
        whole = {name: [RowRange(name, 0, source.facts[name][1][0])] for name in transposed if name not in runs}
        self.source, self.runs, self.transposed = source, {**runs, **whole}, set(transposed)
        self.facts = {name: facts for name, facts in source.facts.items() if name not in hidden}
        for name, parts in self.runs.items():
            dtype, shape = source.facts[parts[0].name]
            rows = sum(self._height(name, part) for part in parts)
            columns = (parts[0].end - parts[0].begin,) if name in self.transposed else shape[1:]
            self.facts[name] = (dtype, (rows, *columns))

    def _height(self, name: str, run: RowRange) -> int:
        """Return the number of rows that a run makes."""
        return self.source.facts[run.name][1][1] if name in self.transposed else run.end - run.begin

    def raw(self, name: str, begin: int, end: int) -> Any:
        if name not in self.runs:
            return self.source.raw(name, begin, end)
        parts, at = [], 0
        for run in self.runs[name]:
            height = self._height(name, run)
            low, high = max(begin - at, 0), min(end - at, height)
            if low < high and name in self.transposed:
                items = self.source.raw(run.name, run.begin, run.end).reshape(run.end - run.begin, height, -1)
                parts.append(np.ascontiguousarray(items[:, low:high].swapaxes(0, 1)).reshape(-1))
            elif low < high:
                parts.append(self.source.raw(run.name, run.begin + low, run.begin + high))
            at += height
        return np.concatenate(parts)


def with_llama_keys(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config with its family's defaults, which files may omit, and LLaMA's keys for the model's shape.

    Raises ModelError for a family whose GGUF has not been verified, and transformers' own errors for a contradictory
    config.
    """
    from transformers import AutoConfig

    check_family(str(config.get("model_type")))
    whole = {**config, **type(AutoConfig.for_model(str(config["model_type"]))).from_dict(dict(config)).to_dict()}
    for key, aliases in SHAPE.items():
        for alias in aliases:
            if whole.get(key) is None and whole.get(alias) is not None:
                whole[key] = whole[alias]
    whole["intermediate_size"] = whole.get("intermediate_size") or 4 * int(whole["hidden_size"])
    if whole["model_type"] == "bloom":
        whole.setdefault("max_position_embeddings", 2048)  # BLOOM's training length; ALiBi itself has no limit
    return whole


def for_llama_cpp(tensors: TensorSource, config: Mapping[str, Any]) -> TensorSource:
    """Return the tensors in llama.cpp's layout, without those that the model does not use."""
    kind, layers = str(config["model_type"]), int(config["num_hidden_layers"])
    heads = [name for name in HEADS if name in tensors.facts and config.get("tie_word_embeddings")]
    ahead = [name for name in tensors.facts if (found := LAYER.match(name)) and int(found[1]) >= layers]
    tensors = ReorderedTensors(tensors, {}, hidden=[*heads, *ahead]) if heads or ahead else tensors
    if kind in ("bloom", "gpt_neox"):
        count = int(config["num_attention_heads"])
        width = int(config["hidden_size"]) // count
        fused = [name for name in tensors.facts if ".query_key_value." in name]
        order = [3 * head + part for part in range(3) for head in range(count)]
        return ReorderedTensors(
            tensors, {name: [RowRange(name, width * at, width * (at + 1)) for at in order] for name in fused}
        )
    if "num_experts" in config:
        tensors = _stacked(tensors, int(config["num_experts"]))
    if kind == "deepseek_v3":
        return _decompressed(tensors, config)
    if FAMILIES[kind].transposed:
        matrices = [name for name in tensors.facts if name.split(".")[-2] in ("c_attn", "c_proj", "c_fc")]
        return ReorderedTensors(tensors, {}, [name for name in matrices if len(tensors.facts[name][1]) == 2])
    return tensors


def _stacked(tensors: TensorSource, experts: int) -> ReorderedTensors:
    """Concatenate each layer's separate experts: (experts x rows, columns)."""
    runs = {}
    alone = [name for name in tensors.facts if ".experts." in name]
    for name in alone:
        layer, _unused, rest = name.partition(".experts.")
        expert, _unused2, part = rest.partition(".")
        if expert == "0":
            each = [f"{layer}.experts.{index}.{part}" for index in range(experts)]
            runs[f"{layer}.experts.{part}"] = [RowRange(one, 0, tensors.facts[one][1][0]) for one in each]
    return ReorderedTensors(tensors, runs, hidden=alone)


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
