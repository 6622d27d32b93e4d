"""Check a GGUF file's header before any library reads it: no count in it may reach beyond the file.

GGUF readers trust these counts. A count of 2^40 makes them loop for hours, and an offset outside the file silently
gives wrong numbers. The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import mmap
import struct
from functools import cache
from pathlib import Path

from tongwen.core.errors import MissingPackage, ModelError
from tongwen.core.i18n import _

SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # value type -> bytes
TEXT, ARRAY = 8, 9
ALIGNMENT, LAYERS = "general.alignment", ".block_count"


def check_header(file: Path) -> None:
    """Raise ModelError when the header of a GGUF file is cut off, or claims more than the file contains."""
    facts = file.stat()
    _check(file, facts.st_size, facts.st_mtime_ns)


@cache
def _check(file: Path, size: int, changed: int) -> None:
    if size < 24:
        raise _wrong(file, _("it has only {size} bytes").format(size=size))
    with file.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
        try:
            _HeaderParser(data).parse()
        except (struct.error, IndexError, ValueError, UnicodeDecodeError, OverflowError) as error:
            raise _wrong(file, str(error)) from None


class _HeaderParser:
    """One pass over the header. Raises ValueError for an unknown type or a length that points outside the file."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.at = data, 0

    def parse(self) -> None:
        magic, version, tensors, facts = struct.unpack_from("<4sIQQ", self.data)
        self.at = 24
        if magic != b"GGUF" or version not in (2, 3):
            raise ValueError(_("it is not a GGUF file of version 2 or 3"))
        alignment, layers = 32, 0
        for _index in range(self.checked_count(facts, 12)):
            name, (kind,) = self.text(), self.take("<I")
            at = self.at
            self.value(kind)
            if name == ALIGNMENT:
                alignment = struct.unpack_from("<I", self.data, at)[0]
                if not 0 < alignment <= 1 << 20:
                    raise ValueError(f"{ALIGNMENT}: {alignment}")
            elif name.endswith(LAYERS) and kind in (4, 5):  # 32 bits
                layers = struct.unpack_from("<I", self.data, at)[0]
        if layers > tensors:
            raise ValueError(
                _("it claims {layers} layers, but has {tensors} tensors").format(layers=layers, tensors=tensors)
            )
        ends = [self.tensor() for _ in range(self.checked_count(tensors, 24))]
        begin = -(-self.at // alignment) * alignment
        if ends and begin + max(ends) > len(self.data):
            raise ValueError(_("the file ends before its tensors end"))

    def tensor(self) -> int:
        """Read one tensor's entry. Return the end of its data, relative to the start of the data section."""
        sizes = _block_sizes()
        name, (dimensions,) = self.text(), self.take("<I")
        if not 1 <= dimensions <= 4:
            raise ValueError(f"{name}: {dimensions} dimensions")
        numbers = 1
        for size in self.take(f"<{dimensions}Q"):
            numbers *= size
        kind, begin = self.take("<IQ")
        if kind not in sizes:
            raise ValueError(f"{name}: type {kind}")
        block, width = sizes[kind]
        if not 0 < numbers < 1 << 48 or numbers % block:
            raise ValueError(f"{name}: {numbers} numbers")
        return int(begin + numbers // block * width)

    def value(self, kind: int) -> None:
        if kind == TEXT:
            self.text()
        elif kind == ARRAY:
            inner, count = self.take("<IQ")
            if inner == TEXT:
                for _index in range(self.checked_count(count, 8)):
                    self.skip(self.take("<Q")[0])
            elif inner in SIZES:
                self.skip(count * SIZES[inner])
            else:
                raise ValueError(f"array of type {inner}")
        elif kind in SIZES:
            self.skip(SIZES[kind])
        else:
            raise ValueError(f"value of type {kind}")

    def text(self) -> str:
        (size,) = self.take("<Q")
        begin = self.at
        self.skip(size)
        return self.data[begin : self.at].decode("utf-8")

    def take(self, form: str) -> tuple[int, ...]:
        found = struct.unpack_from(form, self.data, self.at)
        self.at += struct.calcsize(form)
        return found

    def skip(self, size: int) -> None:
        self.at += size
        if self.at > len(self.data):
            raise ValueError(_("a length points beyond the end of the file"))

    def checked_count(self, count: int, least: int) -> int:
        """Return the count if the rest of the file can hold that many items of at least `least` bytes each."""
        if count * least > len(self.data) - self.at:
            raise ValueError(_("a count of {count}").format(count=count))
        return count


@cache
def _block_sizes() -> dict[int, tuple[int, int]]:
    """Return GGML type -> (numbers in a block, bytes of a block)."""
    try:
        import gguf
    except ImportError:
        raise MissingPackage("gguf", _("reading GGUF files"), "gguf") from None
    return {int(kind): sizes for kind, sizes in gguf.GGML_QUANT_SIZES.items()}


def _wrong(file: Path, what: str) -> ModelError:
    return ModelError(
        _("the header of this GGUF file is corrupt: {what}").format(what=what[:120]),
        place=str(file),
        remedy=_("download the whole file again"),
    )
