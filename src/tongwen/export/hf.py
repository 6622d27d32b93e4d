"""Write tensors to an ordinary Hugging Face folder, and check its files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from tongwen.core.errors import NumbersError
from tongwen.core.i18n import _
from tongwen.core.safetensors_io import TensorLocation, TensorSource, blocks, plan_shards


def write(
    tensors: TensorSource, out: Path, shard_bytes: int, progress: Callable[[int], None]
) -> dict[str, TensorLocation]:
    """Write safetensors files with one block of rows in memory at a time; returns each tensor's place."""
    stored = plan_shards(out, tensors.facts, shard_bytes)
    for done, (name, place) in enumerate(stored.items(), 1):
        with place.file.open("r+b") as stream:
            stream.seek(place.begin)
            for rows in blocks(place.shape):
                stream.write(memoryview(tensors.raw(name, *rows)))
        progress(done)
    return stored


def check_same(source: TensorSource, written: TensorSource, place: str) -> None:
    """Raise NumbersError unless the two have bitwise equal tensors."""
    if source.facts != written.facts:
        odd = sorted(source.facts.items() ^ written.facts.items())[0][0]
        raise NumbersError(_("read back from the file, {name} differs from the original").format(name=odd), place=place)
    for name, (_unused, shape) in source.facts.items():
        for rows in blocks(shape):
            if not np.array_equal(source.raw(name, *rows), written.raw(name, *rows)):
                raise NumbersError(
                    _("read back from the file, rows {start} to {end} of {name} differ from the rows written").format(
                        start=rows[0], end=rows[1], name=name
                    ),
                    place=place,
                    remedy=_("the disk or the memory may be failing; try again"),
                )
