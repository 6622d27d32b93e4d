"""How many bytes of text each token stands for."""

from __future__ import annotations

from typing import Any

import numpy as np


def token_bytes(tokenizer: Any) -> np.ndarray:
    """Return (V,) int32: the number of UTF-8 bytes of each token, from the raw token; special tokens count 0.

    Byte-level BPE writes one character per byte; SentencePiece writes U+2581 for a space and <0xNN> for a byte.
    """
    pieces: dict[str, int] = tokenizer.get_vocab()
    sizes = np.zeros(max(pieces.values()) + 1, dtype=np.int32)
    special = set(tokenizer.all_special_ids)
    added = getattr(tokenizer, "added_tokens_decoder", {})
    written = getattr(tokenizer, "written", {})  # texts of ChatGLM's pieces with other names: line ends, runs of spaces
    special |= {index for index, token in added.items() if token.special}
    sentencepiece = any(piece.startswith("\u2581") for piece in pieces) and "Ġ" not in pieces
    for piece, index in pieces.items():
        if index in special:
            continue
        if piece in written:
            sizes[index] = len(written[piece])
        elif index in added:
            sizes[index] = len(str(added[index].content).encode())
        elif sentencepiece:
            is_byte = len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">")
            sizes[index] = 1 if is_byte else len(piece.replace("\u2581", " ").encode())
        else:
            sizes[index] = len(piece)
    return sizes
