"""A token without a row does harm only where a text needs it."""

from __future__ import annotations

import json
from pathlib import Path

from tongwen.core.rowless_tokens import read_rowless, split_rowless

IDS = {"a": 0, "b": 5, "<image>": 6, "</s>": 7, "<|im_end|>": 8}


def test_tokens_without_rows_are_split_into_unused_and_required() -> None:
    added = {"<image>", "</s>", "<|im_end|>"}
    assert split_rowless(IDS, added, ["</s>"], "…<|im_end|>…", 9) == ([], [])
    assert split_rowless(IDS, added, ["</s>"], "…<|im_end|>…", 6) == (["<image>"], ["</s>", "<|im_end|>"])
    assert split_rowless(IDS, added, [], "", 5) == (["<image>", "</s>", "<|im_end|>"], ["b"])


def test_rowless_tokens_are_read_without_remote_code(tmp_path: Path) -> None:
    assert read_rowless(tmp_path, 4) == ([], [])
    added = [{"id": index, "content": text} for text, index in IDS.items() if index > 5]
    definition = {"model": {"vocab": {"a": 0, "b": 5}}, "added_tokens": added}
    (tmp_path / "tokenizer.json").write_text(json.dumps(definition))
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"eos_token": {"content": "</s>"}, "pad_token": "<image>", "chat_template": "{{ '<|im_end|>' }}"})
    )
    assert read_rowless(tmp_path, 6) == (["<image>"], ["</s>", "<|im_end|>"])
