"""Tokenizers of three kinds, and dialogues of plain turns, for the tests of encoding."""

from __future__ import annotations

from pathlib import Path

from tests.conftest import byte_level_tokenizer, sentencepiece_tokenizer
from tongwen.core.records import Dialogue, Message, Origin

KINDS = ("bytes", "sentencepiece", "legacy")


def make(kind: str, folder: Path):
    if kind == "bytes":
        return byte_level_tokenizer(folder)
    return sentencepiece_tokenizer(folder, legacy=kind == "legacy")


def dialogue(*contents: str) -> Dialogue:
    return Dialogue(
        tuple(Message("user" if index % 2 == 0 else "assistant", text) for index, text in enumerate(contents)),
        Origin("f", 1),
    )
