"""Read an adapter folder: which tensors of the base it changes, and how. Nothing is computed yet.

Every tensor of the adapter must have a known role, and match a tensor of the base. Faults that peft accepts silently (a
missing layer, an extra tensor, a rank that differs from the config) are errors here, with the tensor's name.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tongwen.core.errors import ArtifactError
from tongwen.core.i18n import _
from tongwen.core.safetensors_io import TensorSource, blocks, read_header
from tongwen.model.adapters.config import CHANGES_BASE, is_inside, is_target, read_config
from tongwen.model.adapters.patterns import check_patterns
from tongwen.model.loading.adapter_folder import adapter_folder
from tongwen.model.loading.tensors import FLOATS, Array, FileTensors, TorchTensors, load_bin, read_fp32

PREFIX = "base_model.model."
WRAPPERS = (".base_layer", ".modules_to_save.default", ".modules_to_save", ".token_adapter")  # peft's, around a module
PARTS = {
    ".lora_A.weight": "a",
    ".lora_B.weight": "b",
    ".lora_B.bias": "bias",
    ".lora_magnitude_vector": "magnitude",
    ".lora_magnitude_vector.weight": "magnitude",
    ".lora_embedding_A": "embedding_a",
    ".lora_embedding_B": "embedding_b",
    ".trainable_tokens_delta": "rows",
    ".weight": "whole",
    ".bias": "whole",
}
EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight", "embed_in.weight")
HEADS = ("lm_head.weight", "embed_out.weight")


class NotOneToOne(Exception):
    """The adapter's tensors do not map one to one to the base's: only peft, with the model in memory, can merge it."""


@dataclass
class AdapterChange:
    """One adapter's change of one tensor. parts: role -> key in the adapter's file; transposed: the base stores this
    matrix as (in, out)."""

    source: TensorSource
    place: str
    scale: float = 1.0
    rank: int = 1
    rows: list[int] = field(default_factory=list)
    parts: dict[str, str] = field(default_factory=dict)
    transposed: bool = False

    def shape_of(self, role: str) -> tuple[int, ...]:
        return self.source.facts[self.parts[role]][1]

    def read(self, role: str) -> Array:
        return read_fp32(self.source, self.parts[role])

    def low_rank(self) -> tuple[Array, Array] | None:
        """Return (left (rows, r), right (r, columns)): the change is scale x left right. None without these parts."""
        if "a" in self.parts:
            a, b = self.read("a"), self.read("b")
            return (a.T, b.T) if self.transposed else (b, a)
        if "embedding_a" in self.parts:
            return self.read("embedding_a").T, self.read("embedding_b").T
        return None

    def low_rank_shape(self) -> tuple[int, int] | None:
        """Return the shape of the low-rank change; None without one. Raises ArtifactError for contradicting ranks."""
        pair = ("a", "b") if {"a", "b"} & self.parts.keys() else ("embedding_a", "embedding_b")
        if not self.parts.keys() & set(pair):
            return None
        if not self.parts.keys() >= set(pair):
            raise self.refuse(_("one matrix of an A/B pair is missing"))
        (rank, inside), (outside, other) = self.shape_of(pair[0]), self.shape_of(pair[1])
        if not rank == other == self.rank:
            raise self.refuse(
                _("its config has rank {rank}, but its tensors have {tensor_rank} and {other}").format(
                    rank=self.rank, tensor_rank=rank, other=other
                )
            )
        return (inside, outside) if self.transposed or pair[0] == "embedding_a" else (outside, inside)

    def refuse(self, rule: str, remedy: str = "") -> ArtifactError:
        return ArtifactError(f"{next(iter(self.parts.values()), '')}: {rule}", place=self.place, remedy=remedy)


@dataclass
class Adapter:
    """An adapter folder. changes: base tensor -> its change; whole_model: why it cannot be streamed, or empty."""

    folder: Path
    config: dict[str, Any]
    tensors: TensorSource
    changes: dict[str, AdapterChange]
    whole_model: str = ""


def whole_rows(folder: Path) -> dict[str, int]:
    """Return base tensor -> row count for the embedding and head that an adapter of any type brings in full."""
    out: dict[str, int] = {}
    for key, (_unused, shape) in open_tensors(folder).facts.items():
        name, role = _place_of({}, key)
        if role == "whole" and name.endswith((*EMBEDDINGS, *HEADS)) and ".original_module." not in key:
            out[name] = shape[0]
    return out


def read_adapter(folder: Path) -> Adapter:
    """Read an adapter. Raises ArtifactError or ModelError when the folder has none that can be merged into weights."""
    folder = adapter_folder(folder)
    config = read_config(folder)
    tensors = open_tensors(folder)
    check_not_empty(tensors, folder)
    check_patterns(config, (_place_of(config, key)[0].rpartition(".")[0] for key in tensors.facts), folder)
    if reason := _needs_the_model(config):
        return Adapter(folder, config, tensors, {}, reason)
    changes: dict[str, AdapterChange] = {}
    for key, (dtype, _unused) in tensors.facts.items():
        if ".original_module." in key:  # the module before training, which peft saves beside a resized one
            continue
        name, role = _place_of(config, key)
        if role is None or dtype not in FLOATS:
            raise ArtifactError(
                _("the adapter tensor {key!r} cannot be merged").format(key=key),
                place=str(folder),
            )
        if name not in changes:
            target = name.rpartition(".")[0]
            scale, rank = _scale(config, target)
            rows = _rows_of(config.get("trainable_token_indices") or {}, target)
            changes[name] = AdapterChange(tensors, str(folder), scale, rank, rows)
        if role in changes[name].parts:
            if same_numbers(tensors, key, tensors, changes[name].parts[role]):  # peft saves a resized embedding twice
                continue
            raise ArtifactError(_("{key!r} occurs twice").format(key=key), place=str(folder))
        changes[name].parts[role] = key
    _check_kind(config, changes)
    return Adapter(folder, config, tensors, changes)


def check_not_empty(tensors: TensorSource, folder: Path) -> None:
    if not tensors.facts:
        raise ArtifactError(
            _("the adapter is empty: the merged model would equal the base"),
            place=str(folder),
            remedy=_("saving went wrong (a 443-byte file is this case): train and save it again"),
        )


def _needs_the_model(config: Mapping[str, Any]) -> str:
    """Return why only peft, with the model in memory, can merge such an adapter; "" when its tensors suffice."""
    if config.get("target_parameters"):
        return _("it adapts fused weights")
    if (start := config.get("init_lora_weights")) in CHANGES_BASE:
        return _("init_lora_weights: {start} changes the base").format(start=start)
    return ""


def _check_kind(config: Mapping[str, Any], changes: Mapping[str, AdapterChange]) -> None:
    """Raise ArtifactError when a pair lacks what the config says that it has (DoRA's magnitude, a bias), or has more.

    peft would take the base's magnitude for the missing one, and pass over the other.
    """
    for name, change in changes.items():
        if not change.parts.keys() & {"a", "b", "embedding_a", "embedding_b", "magnitude"}:
            continue
        bias = changes.get(f"{name.removesuffix('.weight')}.bias")
        held = {
            "use_dora": "magnitude" in change.parts,
            "lora_bias": bias is not None and "bias" in bias.parts,
        }
        for key, has in held.items():
            if has == bool(config.get(key)) or (key == "lora_bias" and "embedding_a" in change.parts):
                continue
            if has:
                raise change.refuse(
                    _("this pair has the tensor of {key}, which its config does not set").format(key=key),
                    _("correct adapter_config.json: {key}: true").format(key=key),
                )
            raise change.refuse(
                _("{key} is set, but this pair lacks its tensor").format(key=key),
                _("part of it was lost when it was saved: save it again"),
            )


def check_complete(adapter: Adapter, modules: set[str], biases: set[str]) -> None:
    """Raise ArtifactError when a module that the config lists as trained has no tensors, or when another one has.

    modules, biases: the base's modules with a matrix, and those with a bias.
    """
    config = adapter.config
    adapted = {name.rpartition(".")[0] for name in adapter.changes}
    paired = {name.removesuffix(".weight") for name, change in adapter.changes.items() if change.low_rank_shape()}
    missing = [module for module in modules - adapted if is_target(config, module)]
    missing += [
        name for name in config.get("modules_to_save") or [] if not any(is_inside(name, module) for module in adapted)
    ]
    trained = {"all": biases, "lora_only": biases & paired}.get(config.get("bias") or "none", set())
    missing += [f"{module}.bias" for module in trained if f"{module}.bias" not in adapter.changes]
    if config.get("trainable_token_indices") and not any("rows" in one.parts for one in adapter.changes.values()):
        missing.append("trainable_token_indices")
    if missing:
        raise ArtifactError(
            _("{count} modules listed as trained are not in its file, the first: {missing}").format(
                count=len(missing), missing=sorted(missing)[0]
            ),
            place=str(adapter.folder),
            remedy=_("part of it was lost when it was saved: save it again"),
        )
    chosen = config.get("target_modules")
    extra = sorted(module for module in paired & modules if chosen and not is_target(config, module))
    if extra and chosen != "all-linear":
        raise ArtifactError(
            _("{count} modules have tensors that the config does not list (target_modules), the first: {extra}").format(
                count=len(extra), extra=extra[0]
            ),
            place=str(adapter.folder),
            remedy=_("peft leaves such tensors out: correct adapter_config.json, or remove them from the file"),
        )


def same_change(one: AdapterChange, other: AdapterChange) -> bool:
    """Whether both bring the same whole tensor, or the same values for the same rows, and nothing else."""
    if one.rows != other.rows or one.parts.keys() != other.parts.keys() or len(one.parts) != 1:
        return False
    (role, name), other_name = next(iter(one.parts.items())), next(iter(other.parts.values()))
    return role in ("whole", "rows") and same_numbers(one.source, name, other.source, other_name)


def same_numbers(one: TensorSource, name: str, other: TensorSource, other_name: str) -> bool:
    """Whether two tensors are bitwise equal, compared block by block."""
    facts = one.facts[name]
    if other.facts[other_name] != facts:
        return False
    return all(np.array_equal(one.raw(name, *rows), other.raw(other_name, *rows)) for rows in blocks(facts[1]))


def same_fp32(one: TensorSource, other: TensorSource, name: str) -> bool:
    """Whether two tensors of this name have the same numbers, whatever their types."""
    shape = one.facts[name][1]
    return shape == other.facts[name][1] and all(
        np.array_equal(read_fp32(one, name, *rows), read_fp32(other, name, *rows)) for rows in blocks(shape)
    )


def open_tensors(folder: Path) -> TensorSource:
    """Open an adapter's tensors. Raises ArtifactError when it has no file of them."""
    safe, old = folder / "adapter_model.safetensors", folder / "adapter_model.bin"
    if safe.is_file():
        return FileTensors(read_header(safe))
    if old.is_file():
        return TorchTensors(load_bin(old))
    raise ArtifactError(
        _("no adapter_model.safetensors in this folder"),
        place=str(folder),
        remedy=_(
            "an old training script may have saved it as pytorch_model.bin: tongwen migrate {folder} --out {folder}-lora"
        ).format(folder=folder),
    )


def _place_of(config: Mapping[str, Any], key: str) -> tuple[str, str | None]:
    """Return (the base's tensor that a tensor of the adapter changes, its role); the role is None when it has none."""
    name = key.removeprefix(PREFIX)
    for ending, role in PARTS.items():
        if name.endswith(ending):
            target = name.removesuffix(ending)
            for wrapper in WRAPPERS:
                target = target.removesuffix(wrapper)
            return (f"{target}.bias" if role == "bias" or ending == ".bias" else f"{target}.weight"), role
    saved = any(is_inside(module, name.rpartition(".")[0]) for module in config.get("modules_to_save") or [])
    saved = saved or (config.get("bias") == "all" and "bias" in name.rpartition(".")[2])
    return name, "whole" if saved and ".lora_" not in name else None


def _scale(config: Mapping[str, Any], target: str) -> tuple[float, int]:
    """Return (scale, rank) with peft's per-module patterns; scale: alpha / r, or alpha / sqrt(r) for rsLoRA."""

    def patterned(patterns: dict[str, Any] | None, default: Any) -> Any:
        for pattern, value in (patterns or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", target):
                return value
        return default

    rank = int(patterned(config.get("rank_pattern"), config["r"]))
    alpha = patterned(config.get("alpha_pattern"), config["lora_alpha"])
    return float(alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank), rank


def _rows_of(rows: Any, target: str) -> list[int]:
    if isinstance(rows, dict):
        return next((list(value) for name, value in rows.items() if target.endswith(name)), [])
    return list(rows)
