"""Give a saved model the tensors of its base that were not changed, byte for byte.

transformers saves what it has loaded, in one dtype. What a model does not load (a head that predicts further
tokens) would be lost, and what was not trained (a tower for pictures) would be converted.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np

from tongwen.core.safetensors_io import INDEX, SHARD_BYTES, TensorSource, blocks, find_tensors, plan_shards
from tongwen.model.adapters.targets import text_part
from tongwen.model.loading.model_ref import ModelRef
from tongwen.model.loading.names import unused_tensors
from tongwen.model.loading.tensors import FLOATS, FileTensors, from_fp32, open_model, read_fp32


def restore_unchanged_tensors(model: Any, ref: ModelRef, folder: Path) -> None:
    """Carry over what a model that was saved in `folder` has not changed, if it is wrapped or did not load everything."""
    unused = unused_tensors(model, ref)
    if unused or text_part(model)[0]:
        base, _config = open_model(ref)
        carry_unchanged(base, folder, unused)


def carry_unchanged(base: TensorSource, folder: Path, unused: Collection[str]) -> int:
    """Rewrite the model files in `folder` with the bytes of the base where its numbers are unchanged.

    unused: the base's tensors that the model did not load; they are added. Returns how many tensors are the base's.
    """
    saved = FileTensors(find_tensors(folder))
    carried = [name for name in base.facts if name in unused or _is_unchanged(base, saved, name)]
    if all(name in saved.facts and saved.facts[name] == base.facts[name] for name in carried):
        return len(carried)
    whole = saved.facts | {name: base.facts[name] for name in carried}
    order = {name: whole[name] for name in [*base.facts, *saved.facts] if name in whole}
    staging = folder / "carried"
    staging.mkdir()
    planned = plan_shards(staging, order, SHARD_BYTES)
    for name, place in planned.items():
        source = base if name in carried else saved
        with place.file.open("r+b") as stream:
            stream.seek(place.begin)
            for rows in blocks(place.shape):
                stream.write(memoryview(source.raw(name, *rows)))
    for file in {stored.file for stored in saved.stored.values()} | {folder / INDEX}:
        file.unlink(missing_ok=True)
    for file in staging.iterdir():
        file.rename(folder / file.name)
    staging.rmdir()
    return len(carried)


def _is_unchanged(base: TensorSource, saved: TensorSource, name: str) -> bool:
    """Whether the saved tensor is the base's, converted to the saved dtype."""
    if name not in saved.facts or saved.facts[name][1] != base.facts[name][1]:
        return False
    (kind, shape), (saved_kind, _shape) = base.facts[name], saved.facts[name]
    if not {kind, saved_kind} <= FLOATS:
        return kind == saved_kind and all(
            np.array_equal(base.raw(name, *rows), saved.raw(name, *rows)) for rows in blocks(shape)
        )
    return all(
        np.array_equal(from_fp32(read_fp32(base, name, *rows), saved_kind), saved.raw(name, *rows))
        for rows in blocks(shape)
    )
