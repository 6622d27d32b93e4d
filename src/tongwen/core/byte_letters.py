"""GPT-2's alphabet: the letter that stands for each byte in the entries of a byte-level vocabulary."""

from __future__ import annotations

from functools import cache

VISIBLE = (*range(33, 127), *range(161, 173), *range(174, 256))  # these bytes stand for themselves


@cache
def letter_of() -> dict[int, str]:
    """Return byte -> letter: bytes that cannot be seen have the letters from U+0100 on."""
    hidden = [byte for byte in range(256) if byte not in VISIBLE]
    return {byte: chr(byte) for byte in VISIBLE} | {byte: chr(256 + place) for place, byte in enumerate(hidden)}


@cache
def byte_of() -> dict[str, int]:
    """Return letter -> byte."""
    return {letter: byte for byte, letter in letter_of().items()}
