"""Read an adapter folder: which tensors of the base it changes, and how. Nothing is computed yet.

Every tensor of the adapter must have a known role, and match a tensor of the base. Faults that peft accepts silently (a
missing layer, an extra tensor, a rank that differs from the config) are errors here, with the tensor's name.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tongwen.core.errors import ArtifactError, ModelError
from tongwen.core.i18n import _
from tongwen.core.safetensors_io import Tensors, blocks, read_header
from tongwen.model.loading.load import adapter_folder, no_adapter_config
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
    """One adapter's change of one tensor. parts: role -> key in the adapter's file."""

    source: Tensors
    place: str
    scale: float
    rank: int
    transposed: bool
    rows: list[int]
    parts: dict[str, str] = field(default_factory=dict)

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
                _("its config has rank {rank}, but its tensors have {rank_2} and {other}").format(
                    rank=self.rank, rank_2=rank, other=other
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
    tensors: Tensors
    changes: dict[str, AdapterChange]
    whole_model: str = ""


def whole_rows(folder: Path) -> dict[str, int]:
    """Return base tensor -> row count for the embedding and head that an adapter of any type brings in full."""
    out: dict[str, int] = {}
    for key, (_unused, shape) in _open(folder).facts.items():
        target, role = _role(key)
        if role == "whole" and f"{target}.weight".endswith((*EMBEDDINGS, *HEADS)) and ".original_module." not in key:
            out[f"{target}.weight"] = shape[0]
    return out


def read_adapter(folder: Path) -> Adapter:
    """Read an adapter. Raises ArtifactError or ModelError when the folder has none that can be merged into weights."""
    folder = adapter_folder(folder)
    config = _read_config(folder)
    tensors = _open(folder)
    if not tensors.facts:
        raise ArtifactError(
            _("the adapter is empty: the merged model would equal the base"),
            place=str(folder),
            remedy=_("saving went wrong (a 443-byte file is this case): train and save it again"),
        )
    changes: dict[str, AdapterChange] = {}
    whole_model = ""
    for key, (dtype, _unused) in tensors.facts.items():
        if ".original_module." in key:  # the module before training, which peft saves beside a resized one
            continue
        target, role = _role(key)
        if role is None or dtype not in FLOATS:
            if config.get("target_parameters"):
                whole_model = _("it adapts fused weights")
                continue
            raise ArtifactError(
                _("the adapter tensor {key!r} cannot be merged").format(key=key),
                place=str(folder),
            )
        name = f"{target}.bias" if role == "bias" or key.endswith(".bias") else f"{target}.weight"
        if name not in changes:
            scale, rank = _scale(config, target)
            transposed = bool(config.get("fan_in_fan_out"))
            rows = _rows_of(config.get("trainable_token_indices") or {}, target)
            changes[name] = AdapterChange(tensors, str(folder), scale, rank, transposed, rows)
        if role in changes[name].parts:
            if config.get("target_parameters"):
                whole_model = _("it adapts fused weights")
                continue
            if same_numbers(tensors, key, tensors, changes[name].parts[role]):  # peft saves a resized embedding twice
                continue
            raise ArtifactError(_("{key!r} occurs twice").format(key=key), place=str(folder))
        changes[name].parts[role] = key
    for change in changes.values():
        if "magnitude" in change.parts and (change.transposed or "embedding_a" in change.parts):
            whole_model = _("its DoRA norms are computed by column")
    return Adapter(folder, config, tensors, changes, whole_model)


def check_complete(adapter: Adapter, modules: set[str]) -> None:
    """Raise ArtifactError when a module that the config lists as trained has no tensors in the file."""
    config = adapter.config
    chosen, excluded = config.get("target_modules"), config.get("exclude_modules") or []
    adapted = {name.rpartition(".")[0] for name in adapter.changes}
    missing = []
    if chosen and not config.get("layers_to_transform"):
        missing = [m for m in modules if _matches(chosen, m) and not _matches(excluded, m) and m not in adapted]
    missing += [name for name in config.get("modules_to_save") or [] if not any(_matches([name], m) for m in adapted)]
    if missing:
        raise ArtifactError(
            _("{count} modules listed as trained are not in its file, the first: {missing}").format(
                count=len(missing), missing=sorted(missing)[0]
            ),
            place=str(adapter.folder),
            remedy=_("part of it was lost when it was saved: save it again"),
        )


def same_tensor(one: AdapterChange, other: AdapterChange) -> bool:
    """Whether both consist of the same whole tensor only."""
    if not one.parts.keys() == other.parts.keys() == {"whole"}:
        return False
    return same_numbers(one.source, one.parts["whole"], other.source, other.parts["whole"])


def same_numbers(one: Tensors, name: str, other: Tensors, other_name: str) -> bool:
    """Whether two tensors are bitwise equal, compared block by block."""
    facts = one.facts[name]
    if other.facts[other_name] != facts:
        return False
    return all(np.array_equal(one.raw(name, *rows), other.raw(other_name, *rows)) for rows in blocks(facts[1]))


def _open(folder: Path) -> Tensors:
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


def _read_config(folder: Path) -> dict[str, Any]:
    file = folder / "adapter_config.json"
    try:
        config = dict(json.loads(file.read_text(encoding="utf-8")))
    except (FileNotFoundError, NotADirectoryError):
        raise no_adapter_config(folder) from None
    except (ValueError, TypeError) as error:
        raise ArtifactError(_("not JSON: {error}").format(error=error), place=str(file)) from None
    if config.get("peft_type") != "LORA":
        raise ModelError(
            _("adapters of type {peft_type!r} cannot be merged into weights").format(peft_type=config.get("peft_type")),
            place=str(file),
        )
    for key in ("r", "lora_alpha"):
        if not isinstance(config.get(key), (int, float)) or config[key] <= 0:
            raise ArtifactError(_("{key} is {config!r}").format(key=key, config=config.get(key)), place=str(file))
    return config


def _role(key: str) -> tuple[str, str | None]:
    name = key.removeprefix(PREFIX)
    for ending, role in PARTS.items():
        if name.endswith(ending):
            target = name.removesuffix(ending)
            for wrapper in WRAPPERS:
                target = target.removesuffix(wrapper)
            return target, role
    return name, None


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


def _matches(patterns: str | list[str], module: str) -> bool:
    """Match as peft does: a list holds name endings, a string is a regular expression for the whole name."""
    if isinstance(patterns, str):
        return bool(re.fullmatch(patterns, module))
    return any(module == pattern or module.endswith(f".{pattern}") for pattern in patterns)
