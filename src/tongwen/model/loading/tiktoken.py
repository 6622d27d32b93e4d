"""Byte-level tokenizers from files that transformers reads incompletely or not at all.

These are ranked bytes (tiktoken, Mistral's tekken) and GGUF, where transformers ignores the pre-tokeniser.

Ranked files have no merges. BPE over ranks merges the neighbours whose concatenation has the lowest rank, so every way
to build a token is a merge of that token's rank. A tiktoken file does not contain the splitting pattern either. It is
known for the published vocabularies, which are recognised by their size; a file of another size is an error.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from tongwen.core import console
from tongwen.core.byte_letters import letter_of
from tongwen.core.errors import ModelError
from tongwen.core.i18n import _
from tongwen.core.model_families import PATTERNS

# Number of tokens in the file -> family, pattern, whether to apply NFC, special tokens after the last rank. From Qwen's
# tokenization_qwen.py and meta-llama's tokenizer.py.
PUBLISHED: dict[int, tuple[str, tuple[str, ...], bool, tuple[str, ...]]] = {
    151_643: ("qwen", PATTERNS["qwen2"], True, ("<|endoftext|>", "<|im_start|>", "<|im_end|>")),
    128_000: (
        "llama-3",
        PATTERNS["llama-bpe"],
        False,
        (
            "<|begin_of_text|>",
            "<|end_of_text|>",
            "<|reserved_special_token_0|>",
            "<|reserved_special_token_1|>",
            "<|finetune_right_pad_id|>",
            "<|reserved_special_token_2|>",
            "<|start_header_id|>",
            "<|end_header_id|>",
            "<|eom_id|>",
            "<|eot_id|>",
            "<|python_tag|>",
            *(f"<|reserved_special_token_{number}|>" for number in range(3, 248)),
        ),
    ),
}


def read_ranks(file: Path) -> Tokenizer | None:
    """Read the tokenizer of a tiktoken or tekken file; None for another file. Raises ModelError for an unknown size."""
    with file.open("rb") as stream:
        start = stream.read(64).lstrip()
    if start.startswith(b"{"):
        return _read_tekken(file)
    found = _read_tiktoken(file)
    if found is None:
        return None
    if len(found) not in PUBLISHED:
        known = ", ".join(f"{size:,} ({name})" for size, (name, *_) in PUBLISHED.items())
        raise ModelError(
            _("this tiktoken file has {count:,} tokens: its splitting pattern is not known").format(count=len(found)),
            place=str(file),
            remedy=_("known sizes: {known}; use a tokenizer.json instead").format(known=known),
        )
    _unused, patterns, composed, special = PUBLISHED[len(found)]
    tokenizer = _tokenizer(found, patterns, {})
    if composed:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in special])
    return tokenizer


def _read_tiktoken(file: Path) -> dict[bytes, int] | None:
    """Return bytes -> rank, or None when a line is not `base64 rank`."""
    out: dict[bytes, int] = {}
    try:
        for line in file.read_text(encoding="ascii").splitlines():
            piece, rank = line.split()
            out[base64.b64decode(piece, validate=True)] = int(rank)
    except (ValueError, binascii.Error):
        return None
    return out or None


def _read_tekken(file: Path) -> Tokenizer | None:
    """Read Mistral's file: special tokens first, then ranked tokens up to the vocabulary size."""
    try:
        content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        config = content["config"]
        special = int(config["default_num_special_tokens"])
        ranked = content["vocab"][: int(config["default_vocab_size"]) - special]
        pieces = {base64.b64decode(entry["token_bytes"]): special + int(entry["rank"]) for entry in ranked}
    except (ValueError, KeyError, TypeError):
        return None
    names = {int(token["rank"]): str(token["token_str"]) for token in content.get("special_tokens") or ()}
    return _tokenizer(
        pieces, (config["pattern"],), {names.get(place, f"<SPECIAL_{place}>"): place for place in range(special)}
    )


def _tokenizer(ids: dict[bytes, int], patterns: Sequence[str], special: dict[str, int]) -> Tokenizer:
    entries = {piece: "".join(letter_of()[byte] for byte in piece) for piece in ids}
    merges = [
        (entries[piece[:cut]], entries[piece[cut:]])
        for piece in sorted(ids, key=ids.__getitem__)
        for cut in sorted(range(1, len(piece)), key=lambda cut: (ids.get(piece[:cut], 0), ids.get(piece[cut:], 0)))
        if piece[:cut] in ids and piece[cut:] in ids
    ]
    vocabulary = special | {entries[piece]: index for piece, index in ids.items()}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=True))
    tokenizer.pre_tokenizer = _cut(patterns)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in special])
    return tokenizer


def _cut(patterns: Sequence[str]) -> Any:
    return pre_tokenizers.Sequence(
        [
            *(pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in patterns),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def fix_gguf_pretokenizer(tokenizer: Any, file: Path) -> None:
    """Give a tokenizer from a GGUF file the pre-tokeniser that the file names; print a notice for an unknown one.

    transformers splits all texts as GPT-2 does, which gives wrong ids for a Llama-3 or Qwen, for example for numbers.
    """
    from gguf import GGUFReader

    fields = GGUFReader(str(file)).fields
    kind, name = (
        str(fields[key].contents()) if key in fields else "" for key in ("tokenizer.ggml.model", "tokenizer.ggml.pre")
    )
    if kind != "gpt2" or name in ("", "default", "gpt-2"):
        return
    backend = tokenizer.backend_tokenizer
    if name == "smollm":
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    elif name in PATTERNS:
        backend.pre_tokenizer = _cut(PATTERNS[name])
        backend.model.ignore_merges = name == "llama-bpe"
        if name == "qwen2":
            backend.normalizer = normalizers.NFC()
    else:
        console.notice(
            _(
                "the file's tokenizer splits text by the unknown rule {name!r}: some ids may differ from the original model's"
            ).format(name=name)
        )
