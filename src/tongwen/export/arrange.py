"""Tensors as another program lays them out, without a copy: rows that are put together from rows of others as they are read.

BLOOM interleaves query, key and value head by head, where llama.cpp wants all queries first; GPT-2 stores its matrices
transposed; Qwen3's experts lie one by one; Baichuan-7B is a LLaMA whose three projections are one matrix.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from tongwen.errors import ModelError
from tongwen.families import family_of
from tongwen.language import say
from tongwen.weights import Tensors

# What a config calls the shape of a model, in LLaMA's words.
SHAPE = {
    "hidden_size": ("n_embd",),
    "num_hidden_layers": ("n_layer",),
    "num_attention_heads": ("n_head",),
    "intermediate_size": ("n_inner",),
    "max_position_embeddings": ("n_positions", "seq_length"),
    "num_experts": ("num_local_experts",),
}


class Run(NamedTuple):
    """Rows [begin, end) of a tensor."""

    name: str
    begin: int
    end: int


class Arranged:
    """A source's tensors, some of them put together from runs of rows. transposed: these are turned over as well."""

    def __init__(
        self,
        source: Tensors,
        runs: Mapping[str, Sequence[Run]],
        transposed: Sequence[str] = (),
        hidden: Sequence[str] = (),
    ) -> None:
        self.source, self.runs, self.transposed = source, runs, set(transposed)
        self.facts = {name: facts for name, facts in source.facts.items() if name not in hidden}
        for name, parts in runs.items():
            dtype, shape = source.facts[parts[0].name]
            self.facts[name] = (dtype, (sum(part.end - part.begin for part in parts), *shape[1:]))
        for name in self.transposed:
            dtype, shape = source.facts[name]
            self.facts[name] = (dtype, (shape[1], shape[0]))

    def raw(self, name: str, begin: int, end: int) -> Any:
        if name in self.transposed:
            high, wide = self.source.facts[name][1]
            items = self.source.raw(name, 0, high).reshape(high, wide, -1)
            return np.ascontiguousarray(items[:, begin:end].swapaxes(0, 1)).reshape(-1)
        if name not in self.runs:
            return self.source.raw(name, begin, end)
        parts, at = [], 0
        for run in self.runs[name]:
            low, high = max(begin, at), min(end, at + run.end - run.begin)
            if low < high:
                parts.append(self.source.raw(run.name, run.begin + low - at, run.begin + high - at))
            at += run.end - run.begin
        return np.concatenate(parts)


def for_llama_cpp(tensors: Tensors, config: Mapping[str, Any]) -> tuple[Tensors, dict[str, Any]]:
    """The tensors in llama.cpp's order, and the config with LLaMA's words for its shape."""
    config = dict(config)
    for ours, others in SHAPE.items():
        for other in others:
            if config.get(ours) is None and config.get(other) is not None:
                config[ours] = config[other]
    config["intermediate_size"] = config.get("intermediate_size") or 4 * int(config["hidden_size"])
    family = family_of(str(config.get("model_type")))
    if config.get("model_type") == "bloom":
        config.setdefault("max_position_embeddings", 2048)  # what it was trained on; ALiBi itself has no limit
        width, heads = (
            int(config["hidden_size"]) // int(config["num_attention_heads"]),
            int(config["num_attention_heads"]),
        )
        fused = [name for name in tensors.facts if ".query_key_value." in name]
        order = [3 * head + part for part in range(3) for head in range(heads)]
        return Arranged(
            tensors, {name: [Run(name, width * at, width * (at + 1)) for at in order] for name in fused}
        ), config
    if config.get("model_type") == "qwen3_moe":
        return _stacked(tensors, int(config["num_experts"])), config
    if family and family.transposed:
        matrices = [name for name in tensors.facts if name.split(".")[-2] in ("c_attn", "c_proj", "c_fc")]
        return Arranged(tensors, {}, [name for name in matrices if len(tensors.facts[name][1]) == 2]), config
    return tensors, config


def _stacked(tensors: Tensors, experts: int) -> Arranged:
    """The experts of a layer end to end, (experts x rows, columns), where the files have them one by one."""
    runs = {}
    alone = [name for name in tensors.facts if ".experts." in name]
    for name in alone:
        layer, _, rest = name.partition(".experts.")
        expert, _, part = rest.partition(".")
        if expert == "0":
            each = [f"{layer}.experts.{index}.{part}" for index in range(experts)]
            runs[f"{layer}.experts.{part}"] = [Run(one, 0, tensors.facts[one][1][0]) for one in each]
    return Arranged(tensors, runs, hidden=alone)


def as_llama(tensors: Tensors, config: Mapping[str, Any], place: str) -> tuple[Tensors, dict[str, Any]]:
    """A Baichuan-7B as the LLaMA that it is. Raises ModelError for the others of that name."""
    packed = [name for name in tensors.facts if name.endswith(".W_pack.weight")]
    if "model_max_length" in config or not packed:  # only the 13B say it so: they have ALiBi
        raise ModelError(
            say("this Baichuan has ALiBi positions and is no LLaMA", "该 Baichuan 使用 ALiBi 位置，不是 LLaMA 结构"),
            place=place,
            remedy=say("use a Baichuan-7B, or Qwen3", "请用 Baichuan-7B，或 Qwen3"),
        )
    if int(config["vocab_size"]) > 100_000:
        raise ModelError(
            say("Baichuan2 normalises its head, which no LLaMA does", "Baichuan2 会归一化输出层，LLaMA 没有这一步"),
            place=place,
            remedy=say("use a Baichuan-7B, or Qwen3", "请用 Baichuan-7B，或 Qwen3"),
        )
    runs = {}
    for name in packed:
        third = tensors.facts[name][1][0] // 3
        for at, part in enumerate("qkv"):
            runs[name.replace("W_pack", f"{part}_proj")] = [Run(name, third * at, third * (at + 1))]
    out = {key: value for key, value in config.items() if key not in ("auto_map", "tokenizer_class")}
    out |= {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    return Arranged(
        tensors, runs, hidden=[*packed, *(n for n in tensors.facts if n.endswith("rotary_emb.inv_freq"))]
    ), out
