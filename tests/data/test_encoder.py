"""The prefix of a tokenizer is added once."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.data.encoding import KINDS, make
from tongwen.data.encoder import Encoder


@pytest.mark.parametrize("kind", KINDS)
def test_prefix_is_added_exactly_once(kind: str, tmp_path: Path) -> None:
    tokenizer = make(kind, tmp_path)
    encoder = Encoder(tokenizer)
    assert encoder.prefix == ([] if kind == "bytes" else [1])
    for text in ("你好", "<s>你好", "<s><s>你好") if encoder.prefix else ("你好",):
        ids = encoder.encode_prompt(text)
        assert ids[:1] == encoder.prefix[:1] or not encoder.prefix
        assert ids.count(1) == len(encoder.prefix) or not encoder.prefix
