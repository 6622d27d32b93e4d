"""Byte-level BPE through tiktoken, four times as fast on Chinese, for tokenizers for which it provably gives the same ids.

The tokenizers library merges a pair if the pair is listed; tiktoken merges it if the result is in the vocabulary. The two
agree if the own bytes of every token merge to that token, and ids rise in the order of the merges: then an unlisted pair
never occurs side by side. (If it did, its bytes had not merged with anything outside it, and would have merged as they do
alone: to the token, by the listed pair.) This module checks both conditions for each tokenizer.

The libraries also split texts into words with different tables of letters and blanks. Texts with characters outside the
blocks that have been stable in many versions of Unicode go to the tokenizers library.
"""

from __future__ import annotations

import json
import os
import re
import unicodedata
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import numpy as np

from tongwen.core.byte_letters import byte_of

# GPT-2's pattern for words, built into the tokenizers library as ByteLevel(use_regex=True).
GPT2 = r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
# The same behind Digits, which sets digits apart first: a blank never joins a digit, and blanks before one are a word.
DIGITS_GPT2 = r"""{digits}|'s|'t|'re|'ve|'m|'ll|'d| ?\p{{L}}+| ?[^\s\p{{L}}\p{{N}}]+|\s+(?=\p{{N}})|\s+(?!\S)|\s+"""
SHARE = 64  # texts per task of a thread
_SURE = (
    "\t\n\r -~\xa0-\u024f\u0370-\u03ff\u0400-\u045f\u2010-\u2027\u2030-\u205e\u20ac\u2100-\u214f\u2190-\u22ff\u2460-\u24ff"
    "\u2500-\u26ff\u3000-\u303f\u3041-\u3096\u309b-\u30ff\u3400-\u4db5\u4e00-\u9fa5\uff01-\uffee"
)
_UNSURE = re.compile(f"[^{_SURE}]")


class TiktokenEncoder:
    """encode(text) returns (L,) uint32 ids, or None for a text that the tokenizers library must encode."""

    def __init__(self, encoding: Any, composed: bool) -> None:
        self._encoding, self._composed = encoding, composed

    def encode(self, text: str) -> np.ndarray | None:
        if _UNSURE.search(text) or (self._composed and not unicodedata.is_normalized("NFC", text)):
            return None
        ids: np.ndarray = self._encoding.encode_to_numpy(text, allowed_special="all")
        return ids

    def encode_all(self, texts: Sequence[str]) -> list[np.ndarray | None]:
        """Encode texts on all cores: tiktoken releases the GIL."""
        count = _threads()
        if count < 2 or len(texts) < 2 * SHARE:
            return [self.encode(text) for text in texts]
        shares = [texts[begin : begin + SHARE] for begin in range(0, len(texts), SHARE)]
        with ThreadPoolExecutor(count) as pool:
            return [
                ids for part in pool.map(lambda share: [self.encode(text) for text in share], shares) for ids in part
            ]


def _threads() -> int:
    """Return the number of threads that the tokenizers library would use."""
    if os.environ.get("TOKENIZERS_PARALLELISM", "").lower() in ("false", "0", "off", "no"):
        return 1
    wanted = os.environ.get("RAYON_NUM_THREADS", "")
    return int(wanted) if wanted.isdecimal() and int(wanted) else os.cpu_count() or 1


def make_tiktoken_encoder(backend: Any) -> TiktokenEncoder | None:
    """Return the same tokenizer with tiktoken, or None when its kind is not supported or the check fails."""
    import tiktoken

    tokenizer: dict[str, Any] = json.loads(backend.to_str())
    model, added = tokenizer["model"], tokenizer["added_tokens"]
    pattern = _pattern(tokenizer["pre_tokenizer"])
    plain = model["type"] == "BPE" and not any(
        model.get(name) for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback")
    )
    normalizer = (tokenizer["normalizer"] or {"type": ""})["type"]
    if not plain or pattern is None or normalizer not in ("", "NFC") or not _are_plain(added, normalizer):
        return None
    special = {token["content"]: token["id"] for token in added}
    ranks = _ranks(model, special)
    if ranks is None or not _all_are_reached(tokenizer, backend, special):
        return None
    encoding = tiktoken.Encoding("tongwen", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)
    return TiktokenEncoder(encoding, composed=normalizer == "NFC")


def _pattern(pre_tokenizer: dict[str, Any] | None) -> str | None:
    """Return the word pattern of a pre-tokenizer, or None when the pre-tokenizer does anything else."""
    if not pre_tokenizer:
        return None
    parts = pre_tokenizer["pretokenizers"] if pre_tokenizer["type"] == "Sequence" else [pre_tokenizer]
    last = parts[-1]
    if last["type"] != "ByteLevel" or last.get("add_prefix_space", True):
        return None
    if len(parts) == 1:
        return GPT2 if last.get("use_regex", True) else None
    first = parts[0]
    if len(parts) == 2 and first["type"] == "Digits" and last.get("use_regex", True):
        return DIGITS_GPT2.format(digits=r"\p{N}" if first.get("individual_digits") else r"\p{N}+")
    isolates = first["type"] == "Split" and first["behavior"] == "Isolated" and not first["invert"]
    if len(parts) != 2 or not isolates or last.get("use_regex", True):
        return None
    return first["pattern"].get("Regex")  # type: ignore[no-any-return]


def _are_plain(added: list[dict[str, Any]], normalizer: str) -> bool:
    """Whether added tokens match texts literally, and none is a prefix of another."""
    odd = any(token["single_word"] or token["lstrip"] or token["rstrip"] for token in added)
    odd = odd or (bool(normalizer) and any(token["normalized"] for token in added))
    names = sorted(token["content"] for token in added)
    return not odd and not any(after.startswith(name) for name, after in pairwise(names))


def _ranks(model: dict[str, Any], special: dict[str, int]) -> dict[bytes, int] | None:
    """Return {bytes of a token: id}; None when ids do not rise in the order of the merges, or a byte has no token."""
    vocabulary: dict[str, int] = model["vocab"]
    try:
        ranks = {
            bytes([byte_of()[letter] for letter in token]): index
            for token, index in vocabulary.items()
            if token not in special
        }
        pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
        made = [vocabulary[one + other] for one, other in pairs]
    except (KeyError, ValueError):
        return None
    needed = "".join(re.findall(f"[{_SURE}]", "".join(map(chr, [*range(0xD800), *range(0xE000, 0x10000)]))))
    single = {token for token in ranks if len(token) == 1}
    complete = all(bytes([byte]) in single for byte in set(needed.encode()))
    rising = all(one < other for one, other in pairwise(made))
    return ranks if complete and rising and len(ranks) == len(single) + len(made) else None


def _all_are_reached(tokenizer: dict[str, Any], backend: Any, special: dict[str, int]) -> bool:
    """Whether the tokenizers library merges each token's own bytes to it."""
    if tokenizer["model"].get("ignore_merges"):  # with it, the library would look up the whole text before merging
        without = {**tokenizer, "model": {**tokenizer["model"], "ignore_merges": False}}
        backend = type(backend).from_str(json.dumps(without, ensure_ascii=False))
    model = backend.model
    return all(
        [token.id for token in model.tokenize(text)] == [index]
        for text, index in tokenizer["model"]["vocab"].items()
        if text not in special
    )
