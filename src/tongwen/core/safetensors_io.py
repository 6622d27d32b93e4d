"""Find, check, plan and copy tensors in safetensors files as byte ranges, without loading them.

This module computes nothing, so merge, convert and verify share one reader of the format. Headers are checked against the
file: every range is inside the file, ranges do not overlap, and each has the length of its type and shape.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Protocol

from tongwen.core.errors import ModelError
from tongwen.core.i18n import _

ITEM_BYTES = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "I64": 8,
    "I32": 4,
    "I16": 2,
    "I8": 1,
    "U64": 8,
    "U32": 4,
    "U16": 2,
    "U8": 1,
    "BOOL": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "F8_E8M0": 1,
}
NARROW = {"F4", "F6_E2M3", "F6_E3M2"}  # several numbers share a byte
INDEX = "model.safetensors.index.json"
SHARD_BYTES = 5_000_000_000
CHUNK = 1 << 19
LONGEST_HEADER = 100_000_000
# Numbers per block. A block in fp32 and its copies fit a core's L2 cache, and its product with a matrix of rank 16 takes a
# million multiplications: up to that size OpenBLAS multiplies matrices in place, without packing them first.
BLOCK = 62_500


@dataclass(frozen=True)
class TensorLocation:
    """The location of one tensor: a file and its bytes [begin, end)."""

    name: str
    dtype: str  # in safetensors' names: BF16, F32, ...
    shape: tuple[int, ...]
    file: Path
    begin: int
    end: int

    @property
    def size(self) -> int:
        return self.end - self.begin


class TensorSource(Protocol):
    """Tensors by name, in any storage. facts: name -> (type, shape).

    `raw` returns the bytes of rows [begin, end) as a flat numpy array: rows along the first dimension, or the elements of
    a vector. It is thread-safe.
    """

    facts: dict[str, tuple[str, tuple[int, ...]]]

    def raw(self, name: str, begin: int, end: int) -> Any: ...


def find_tensors(folder: Path) -> dict[str, TensorLocation]:
    """Return all tensors of a model or adapter folder by name; empty when it has no safetensors files.

    Raises ModelError when the index names a file outside the folder or one that is missing, when index and shards
    disagree, or when two shards contain the same tensor.
    """
    index, whole = folder / INDEX, folder / "model.safetensors"
    mapped = read_index(index) if index.is_file() and not whole.is_file() else None  # transformers' own precedence
    if mapped is not None:
        files = [folder / name for name in sorted(set(mapped.values()))]
    else:
        files = [whole] if whole.is_file() else sorted(folder.glob("*.safetensors"))
    found: dict[str, TensorLocation] = {}
    for file in files:
        for name, stored in read_header(file).items():
            if name in found:
                raise _broken(file, _("{name} is also in {file}").format(name=name, file=found[name].file.name))
            found[name] = stored
    for name, file_name in (mapped or {}).items():
        if name not in found or found[name].file.name != file_name:
            raise _broken(index, _("{name} is not in {file_name}").format(name=name, file_name=file_name))
    if mapped is not None and (strange := sorted(found.keys() - mapped.keys())):
        raise _broken(index, _("the index does not list {name}").format(name=strange[0]))
    return found


def read_index(index: Path) -> dict[str, str]:
    """Return {tensor: shard file}. Raises ModelError for a shard that is missing or outside the folder."""
    try:
        mapped = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
    except (ValueError, KeyError, TypeError):
        raise _broken(index, _("the index cannot be read")) from None
    for name, file_name in mapped.items():
        if not isinstance(file_name, str) or Path(file_name).name != file_name or "\\" in file_name:
            raise ModelError(
                _("the index places {name} in {file_name!r}, outside this folder").format(
                    name=name, file_name=file_name
                ),
                place=str(index),
                remedy=_("do not use this model: its index was tampered with"),
            )
    for file_name in sorted(set(mapped.values())):
        if not (index.parent / file_name).is_file():
            raise _broken(index, _("the shard {file_name} is missing").format(file_name=file_name))
    return mapped


def read_header(file: Path) -> dict[str, TensorLocation]:
    """Return the tensors of one file, in byte order. Raises ModelError when the file is damaged or incomplete."""
    length = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(8)
        size = int.from_bytes(start, "little")
        if len(start) < 8 or size > min(length - 8, LONGEST_HEADER):
            raise _broken(
                file, describe_wrong_file(file) or _("the file ends after {length} bytes").format(length=length)
            )
        try:
            header: dict[str, Any] = json.loads(stream.read(size))
            found = {
                name: TensorLocation(
                    name,
                    facts["dtype"],
                    tuple(int(number) for number in facts["shape"]),
                    file,
                    8 + size + int(facts["data_offsets"][0]),
                    8 + size + int(facts["data_offsets"][1]),
                )
                for name, facts in header.items()
                if name != "__metadata__"
            }
        except (ValueError, AttributeError, KeyError, TypeError, IndexError, RecursionError, OverflowError):
            raise _broken(file, _("the file header cannot be read")) from None
    at = 8 + size
    ordered = sorted(found.values(), key=lambda stored: (stored.begin, stored.end))
    for stored in ordered:
        is_known = isinstance(stored.dtype, str) and stored.dtype in ITEM_BYTES.keys() | NARROW
        if (
            stored.begin != at
            or not is_known
            or (stored.dtype not in NARROW and stored.size != ITEM_BYTES[stored.dtype] * prod(stored.shape))
            or min(stored.shape, default=0) < 0
        ):
            raise _broken(file, _("the file header does not match {stored}").format(stored=stored.name))
        at = stored.end
    if at != length:
        raise _broken(file, _("the file should have {at} bytes but has {length}").format(at=at, length=length))
    return {stored.name: stored for stored in ordered}


def row_count(shape: tuple[int, ...]) -> int:
    return shape[0] if shape else 1


def row_bytes(dtype: str, shape: tuple[int, ...]) -> int:
    return ITEM_BYTES[dtype] * prod(shape[1:])


def blocks(shape: tuple[int, ...], least: int = 1) -> Iterator[tuple[int, int]]:
    """Yield row ranges [begin, end) of about BLOCK numbers each, and of at least `least` rows."""
    height = max(1, least, BLOCK // max(prod(shape[1:]), 1))
    count = row_count(shape)
    for begin in range(0, count, height):
        yield begin, min(begin + height, count)


def describe_wrong_file(file: Path) -> str:
    """Describe a file that is not weights: an LFS pointer, a web page, or empty. Return "" when it is none of these."""
    with file.open("rb") as stream:
        start = stream.read(64)
    if not start:
        return _("the file is empty")
    if start.startswith(b"version https://git-lfs"):
        return _("it is a Git LFS pointer, not the file itself")
    if start.lstrip()[:1] == b"<":
        return _("it is a web page")
    return ""


def plan_shards(
    folder: Path, tensors: Mapping[str, tuple[str, tuple[int, ...]]], limit: int
) -> dict[str, TensorLocation]:
    """Create safetensors files for these tensors (name -> type, shape), with headers, index and full length.

    Returns the location of each tensor; the caller writes the bytes.
    """
    shards: list[list[str]] = [[]]
    filled = 0
    for name, (dtype, shape) in tensors.items():
        size = ITEM_BYTES[dtype] * prod(shape)
        if shards[-1] and filled + size > limit:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    planned: dict[str, TensorLocation] = {}
    for number, names in enumerate(shards, 1):
        name = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        planned |= _make_file(folder / name, {name: tensors[name] for name in names})
    if len(shards) > 1:
        total = sum(stored.size for stored in planned.values())
        index = {"metadata": {"total_size": total}, "weight_map": {n: planned[n].file.name for n in sorted(planned)}}
        (folder / INDEX).write_text(json.dumps(index, indent=1), encoding="utf-8")
    return planned


def _make_file(file: Path, tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> dict[str, TensorLocation]:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, (dtype, shape) in tensors.items():
        end = at + ITEM_BYTES[dtype] * prod(shape)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        stream.truncate(8 + len(text) + at)
    start = 8 + len(text)
    return {
        name: TensorLocation(name, dtype, shape, file, *(start + offset for offset in header[name]["data_offsets"]))
        for name, (dtype, shape) in tensors.items()
    }


def copy_bytes(source: TensorLocation, target: TensorLocation) -> None:
    """Copy a tensor's bytes from file to file, in the kernel if possible; both must have the same size."""
    assert source.size == target.size
    with source.file.open("rb") as reader, target.file.open("r+b") as writer:
        done = 0
        try:
            while done < source.size:
                moved = os.copy_file_range(
                    reader.fileno(), writer.fileno(), source.size - done, source.begin + done, target.begin + done
                )
                if not moved:
                    break
                done += moved
        except (OSError, AttributeError):  # another file system or operating system: continue with read and write
            pass
        reader.seek(source.begin + done)
        writer.seek(target.begin + done)
        while done < source.size:
            block = reader.read(min(CHUNK, source.size - done))
            if not block:
                raise _broken(source.file, _("the file ends early"))
            writer.write(block)
            done += len(block)


def iter_bytes(stored: TensorLocation) -> Iterator[bytes]:
    """Yield a tensor's bytes in chunks. Raises ModelError when the file ends early."""
    with stored.file.open("rb") as stream:
        stream.seek(stored.begin)
        left = stored.size
        while left:
            block = stream.read(min(CHUNK, left))
            if not block:
                raise _broken(stored.file, _("the file ends early"))
            left -= len(block)
            yield block


def _broken(file: Path, what: str) -> ModelError:
    return ModelError(
        _("the model cannot be loaded: {what}").format(what=what),
        place=str(file),
        remedy=_("fetch it again: the file is incomplete"),
    )
