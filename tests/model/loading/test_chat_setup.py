"""The end of a document is the token that the family uses."""

from __future__ import annotations

from pathlib import Path

from tests.data.encoding import make
from tongwen.model.loading.chat_setup import end_of_text


def test_end_of_text_token_of_the_family(tmp_path: Path) -> None:
    """An instruct tokenizer's eos ends an answer, not a document."""
    tokenizer = make("bytes", tmp_path)
    assert tokenizer.eos_token == "<|im_end|>"
    assert end_of_text(tokenizer) == tokenizer.convert_tokens_to_ids("<|endoftext|>")
    assert end_of_text(make("sentencepiece", tmp_path / "b")) == 2
