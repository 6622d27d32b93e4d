"""Translate between the names of tensors in a model's files and in memory, with transformers' own conversion map.

A model may be saved under other names than its modules have: a wrapped model from before a prefix changed, or experts
that the files keep apart and memory holds as one tensor.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tongwen.core.safetensors_io import find_tensors
from tongwen.model.loading.architecture import build_on_meta, load_config
from tongwen.model.loading.locate import cached_folder
from tongwen.model.loading.model_ref import ModelRef
from tongwen.model.loading.tensors import BUFFERS


@dataclass(frozen=True)
class TensorNames:
    """files: name in memory -> names in the files; computed: names in memory of tensors that are computed from the
    files' (stacked, split or transposed); matrices: names in memory of modules with a plain matrix; unused: names in
    the files that the model does not load"""

    files: dict[str, list[str]]
    computed: set[str]
    matrices: set[str]
    unused: list[str]

    def in_file(self, name: str) -> str | None:
        """Return the name in the files of a tensor that is there as it is in memory; None for any other."""
        found = self.files.get(name, [])
        return found[0] if len(found) == 1 and name not in self.computed else None


def names_of(model: Any, stored: Iterable[str]) -> TensorNames:
    """Return how the names of a model's tensors (it may be on the meta device) map to the names in its files."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    conversions = get_model_conversion_mapping(model)
    renamings = [one for one in conversions if isinstance(one, WeightRenaming)]
    converters = [one for one in conversions if isinstance(one, WeightConverter)]
    state, prefix = model.state_dict(), model.base_model_prefix
    files: dict[str, list[str]] = {}
    computed, unused = set(), []
    for key in stored:
        name, converter = rename_source_key(key, renamings, converters, prefix, state)
        if name not in state and key in state:  # as transformers' loader does
            name, converter = rename_source_key(key, [], [], prefix, state)
        if name not in state:
            unused.append(key)
            continue
        files.setdefault(name, []).append(key)
        if converter is not None:
            computed.add(name)
    matrices = {
        name.removesuffix(".weight") for name, part in state.items() if name.endswith(".weight") and part.dim() == 2
    }
    return TensorNames(files, computed, matrices, unused)


def unused_tensors(model: Any, ref: ModelRef) -> list[str]:
    """Return the names of tensors in a model's files that the model does not load; empty where nothing can be said."""
    folder = Path(ref.folder) if ref.is_local else cached_folder(ref.folder)
    if folder is None or ref.gguf or getattr(model.config, "quantization_config", None):
        return []
    stored = (name for name in find_tensors(folder) if not name.endswith(BUFFERS))
    return names_of(model, stored).unused


def all_names(ref: ModelRef, stored: Iterable[str]) -> list[TensorNames]:
    """Return the names of a model, and those of its text part opened alone where transformers can: adapters use both."""
    from transformers import AutoModelForCausalLM
    from transformers.models.auto import modeling_auto as auto

    config, stored = load_config(ref), list(stored)
    skeleton = build_on_meta(config)
    found = [names_of(skeleton, stored)]
    alone = auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type)
    if alone and alone != type(skeleton).__name__:
        import torch

        with torch.device("meta"):
            found.append(names_of(AutoModelForCausalLM.from_config(config), stored))
    return found
