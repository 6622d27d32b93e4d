"""Byte-level BPE through tiktoken, which is faster on Chinese, for tokenizers for which it provably gives the same ids.

The tokenizers library merges a pair if the pair is listed, in the order of the list; tiktoken merges it if the result is in
the vocabulary, in the order of the ids. The two agree if the own bytes of every token merge to that token, and ids do not fall
in the order of the merges. Then one pair alone makes a token, however many are listed: where two pieces of a token stand side
by side, their bytes have not merged with anything outside, so they have merged as they do alone, and go on to the token. (A
token whose bytes alone end as three pieces or more never has two side by side. It is found only where it is a whole word, if
the tokenizer looks words up first, as tiktoken does.) This module checks the conditions for each tokenizer.

Several splits in a row become one pattern: all but the last must set classes of characters apart, and the later ones are
restricted to other characters. What no split matches is a word of its own, as in the tokenizers library.

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
from tongwen.core.i18n import _

# GPT-2's pattern for words, built into the tokenizers library as ByteLevel(use_regex=True).
GPT2 = r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
# A class of characters in a regular expression, and one that is repeated: a split by it sets the characters apart.
_CLASS = r"\\[pP]\{\w+\}|\[(?:\\.|[^\[\]\\])+\]"
_APART = re.compile(rf"({_CLASS})(?:\+|\{{1,\d+\}})?", re.S)
# Its elements: what is left as it is, and what matches one character.
_ELEMENT = re.compile(rf"(\(\?(?:[:!=]|i:)|\{{[\d,]+\}}|[()|*+?])|({_CLASS}|\\[sSdDwWrnt]|\\\W|[^\\.^$\[\]{{}}])", re.S)
SHARE = 64  # texts per task of a thread
_SURE = (
    "\t\n\r -~\xa0-\u024f\u0370-\u03ff\u0400-\u045f\u2010-\u2027\u2030-\u205e\u20ac\u2100-\u214f\u2190-\u22ff\u2460-\u24ff"
    "\u2500-\u26ff\u3000-\u303f\u3041-\u3096\u309b-\u30ff\u3400-\u4db5\u4e00-\u9fa5\uff01-\uffee"
)
_UNSURE = re.compile(f"[^{_SURE}]")


class Unproven(Exception):
    """Why tiktoken is not known to give the same ids."""


class TiktokenEncoder:
    """encode(text) returns (L,) uint32 ids, or None for a text that the tokenizers library must encode."""

    def __init__(self, encoding: Any, special: dict[str, int], composed: bool) -> None:
        self._encoding, self._composed = encoding, composed
        self._special = {token: np.array([index], np.uint32) for token, index in special.items()}
        # tiktoken's own search for special tokens takes most of the time when there are hundreds of them.
        self._find = re.compile(f"({'|'.join(map(re.escape, special))})").split if special else lambda text: [text]

    def encode(self, text: str) -> np.ndarray | None:
        if _UNSURE.search(text) or (self._composed and not unicodedata.is_normalized("NFC", text)):
            return None
        parts = [
            self._special[part] if place % 2 else self._encoding.encode_to_numpy(part)
            for place, part in enumerate(self._find(text))
            if part
        ]
        return np.concatenate(parts) if len(parts) > 1 else parts[0] if parts else np.zeros(0, np.uint32)

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


def make_tiktoken_encoder(backend: Any) -> TiktokenEncoder:
    """Return the same tokenizer with tiktoken. Raises Unproven when its kind is not supported or the check fails."""
    import tiktoken

    tokenizer: dict[str, Any] = json.loads(backend.to_str())
    model, added = tokenizer["model"], tokenizer["added_tokens"]
    unusual = ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback")
    if model["type"] != "BPE" or any(model.get(name) for name in unusual):
        raise Unproven(_("the tokens are no byte-level BPE"))
    pattern = _pattern(tokenizer["pre_tokenizer"])
    normalizer = tokenizer["normalizer"] or {"type": ""}
    kind = "" if normalizer.get("normalizers") == [] else normalizer["type"]
    if pattern is None or kind not in ("", "NFC"):
        raise Unproven(_("the tokenizer prepares or splits texts in another way than the supported ones"))
    if not _are_plain(added, kind):
        raise Unproven(_("a special token takes blanks with it, or begins with another one"))
    special = {token["content"]: token["id"] for token in added}
    ranks = _ranks(model, special)
    if ranks is None or not _all_are_reached(tokenizer, backend, special):
        raise Unproven(_("some tokens are not made by their merges"))
    encoding = tiktoken.Encoding("tongwen", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    return TiktokenEncoder(encoding, special, composed=kind == "NFC")


def _pattern(pre_tokenizer: dict[str, Any] | None) -> str | None:
    """Return the pattern of all words of a pre-tokenizer, or None when the pre-tokenizer does anything else."""
    if not pre_tokenizer:
        return None
    *splits, last = pre_tokenizer["pretokenizers"] if pre_tokenizer["type"] == "Sequence" else [pre_tokenizer]
    if last["type"] != "ByteLevel" or last.get("add_prefix_space", True):
        return None
    patterns = [_pattern_of_split(split) for split in splits] + [GPT2] * last.get("use_regex", True)
    words, apart = list[str](), ""
    for place, pattern in enumerate(patterns, 1):
        found = _APART.fullmatch(pattern or "")
        if pattern is None or (place < len(patterns) and not found):
            return None
        restricted = _restricted(pattern, apart) if apart else pattern
        if restricted is None:
            return None
        words.append(restricted)
        apart += found[1] if found else ""
    matched = "|".join(words)
    return rf"{matched}|(?:(?!{matched})[\s\S])+" if words else None


def _pattern_of_split(split: dict[str, Any]) -> str | None:
    """Return the pattern by which a pre-tokenizer isolates words, or None when it does anything else."""
    if split["type"] == "Digits":
        return r"\p{N}" if split["individual_digits"] else r"\p{N}+"
    if split["type"] != "Split" or split["behavior"] != "Isolated" or split["invert"]:
        return None
    return split["pattern"].get("Regex")  # type: ignore[no-any-return]


def _restricted(pattern: str, apart: str) -> str | None:
    """Return the pattern with all its classes and letters restricted to characters outside the classes `apart`, so that
    it neither takes nor looks at one of those. None when it has an element that is not known here."""
    out, place = "", 0
    while place < len(pattern):
        element = _ELEMENT.match(pattern, place)
        if element is None:
            return None
        out += element[1] or f"[{_in_class(element[2])}&&[^{apart}]]"
        place = element.end()
    return out


def _in_class(element: str) -> str:
    """Return an element that matches one character as it is written inside a class."""
    return f"\\{element}" if len(element) == 1 and element in "&-~" else element


def _are_plain(added: list[dict[str, Any]], normalizer: str) -> bool:
    """Whether added tokens match texts literally, and none is a prefix of another."""
    odd = any(token["single_word"] or token["lstrip"] or token["rstrip"] for token in added)
    odd = odd or (bool(normalizer) and any(token["normalized"] for token in added))
    names = sorted(token["content"] for token in added)
    return not odd and not any(after.startswith(name) for name, after in pairwise(names))


def _ranks(model: dict[str, Any], special: dict[str, int]) -> dict[bytes, int] | None:
    """Return {bytes of a token: id}; None when ids fall in the order of the merges, or a byte has no token."""
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
    complete = all(bytes([byte]) in ranks for byte in set(needed.encode()))
    rising = all(one <= other for one, other in pairwise(made))
    return ranks if complete and rising and {*made} <= {*ranks.values()} else None


def _all_are_reached(tokenizer: dict[str, Any], backend: Any, special: dict[str, int]) -> bool:
    """Whether the tokenizers library merges each token's own bytes to it, or looks it up and merges them to three or more."""
    looks_up = bool(tokenizer["model"].get("ignore_merges"))
    if looks_up:
        without = {**tokenizer, "model": {**tokenizer["model"], "ignore_merges": False}}
        backend = type(backend).from_str(json.dumps(without, ensure_ascii=False))
    model = backend.model
    for text, index in tokenizer["model"]["vocab"].items():
        merged = [token.id for token in model.tokenize(text)] if text not in special else [index]
        if merged != [index] and not (looks_up and len(merged) > 2):
            return False
    return True
