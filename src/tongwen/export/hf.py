"""Any tensors -> an ordinary Hugging Face folder, and the check that its files hold them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from tongwen.core.errors import NumbersError
from tongwen.core.i18n import say
from tongwen.core.safetensors_io import Stored, Tensors, blocks, plan_shards


def write(tensors: Tensors, out: Path, shard_bytes: int, progress: Callable[[int], None]) -> dict[str, Stored]:
    """Safetensors files with these tensors, a block of rows in memory at a time; returns where each lies."""
    stored = plan_shards(out, tensors.facts, shard_bytes)
    for done, (name, place) in enumerate(stored.items(), 1):
        with place.file.open("r+b") as stream:
            stream.seek(place.begin)
            for rows in blocks(place.shape):
                stream.write(memoryview(tensors.raw(name, *rows)))
        progress(done)
    return stored


def check_same(source: Tensors, written: Tensors, place: str) -> None:
    """Raise NumbersError unless the two hold the same tensors to the bit."""
    if source.facts != written.facts:
        odd = sorted(source.facts.items() ^ written.facts.items())[0][0]
        raise NumbersError(say(f"read back, {odd} is another tensor", f"读回后 {odd} 与原来不同"), place=place)
    for name, (_, shape) in source.facts.items():
        for rows in blocks(shape):
            if not np.array_equal(source.raw(name, *rows), written.raw(name, *rows)):
                raise NumbersError(
                    say(
                        f"read back, rows {rows[0]} to {rows[1]} of {name} are not what was written",
                        f"读回后 {name} 的第 {rows[0]} 至 {rows[1]} 行与写入的不同",
                    ),
                    place=place,
                    remedy=say("the disk or the memory may be failing; try again", "磁盘或内存可能有故障；请重试"),
                )
