"""The bytes of tokens add up to the text."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.data.encoding import KINDS, make
from tongwen.core.records import Span
from tongwen.data.encoder import Encoder
from tongwen.data.token_bytes import token_bytes


@pytest.mark.parametrize("kind", KINDS)
def test_bytes_of_tokens_add_up_to_the_text(kind: str, tmp_path: Path) -> None:
    tokenizer = make(kind, tmp_path)
    sizes = token_bytes(tokenizer)
    text = "你好，世界 Hello 😀\n二"
    ids = Encoder(tokenizer).encode([[Span("问", False), Span(text, True)]])[0]
    learned = [index for piece in ids if piece.learn for index in piece.ids]
    assert sizes[learned].sum() == len(text.encode())
    assert not sizes[tokenizer.all_special_ids].any()
