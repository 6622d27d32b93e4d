"""Tokens of a tokenizer for which the embedding of its model has no row.

A text model made from a larger one, or a pad token that a trainer added, leaves such tokens behind; they do no harm as long as no
text has one. Pieces of the vocabulary occur in any text, and a template's tokens in every prompt: those need their rows.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from tongwen.core.artifact import read_json


def split_rowless(
    ids: Mapping[str, int], added: Collection[str], named: Collection[str], template: str, rows: int
) -> tuple[list[str], list[str]]:
    """Return (spare, needed) tokens whose id is not below `rows`. added: tokens beside the vocabulary's own pieces; named:
    begin, end and unknown; template: the chat template's text."""
    beyond = [text for text, index in sorted(ids.items(), key=lambda pair: pair[1]) if index >= rows]
    spare = [text for text in beyond if text in added and text not in named and text not in template]
    return spare, [text for text in beyond if text not in spare]


def read_rowless(folder: Path, rows: int) -> tuple[list[str], list[str]]:
    """Return the (spare, needed) tokens of a folder's tokenizer.json, both empty without that file."""
    file = folder / "tokenizer.json"
    if not file.is_file():
        return [], []
    found = read_json(file)
    vocabulary = found["model"]["vocab"]
    pieces = vocabulary if isinstance(vocabulary, dict) else {text: index for index, (text, _) in enumerate(vocabulary)}
    added = {token["content"]: int(token["id"]) for token in found.get("added_tokens", ())}
    config, template = _read(folder / "tokenizer_config.json"), folder / "chat_template.jinja"
    texts = [json.dumps(config.get("chat_template") or "", ensure_ascii=False)]
    if template.is_file():
        texts.append(template.read_text(encoding="utf-8"))
    named = [_text(config.get(key)) for key in ("bos_token", "eos_token", "unk_token")]
    return split_rowless({**pieces, **added}, added.keys() - pieces.keys(), named, "\n".join(texts), rows)


def _read(file: Path) -> dict[str, Any]:
    return read_json(file) if file.is_file() else {}


def _text(token: Any) -> str:
    return str(token.get("content", "")) if isinstance(token, dict) else str(token or "")
