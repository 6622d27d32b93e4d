"""Byte-level BPE (GPT-2's kind: Llama-3, Qwen, SmolLM2, BLOOM): read its file and append merges.

New merges come after all old ones, so a text without a new pair keeps exactly its ids. Added tokens are also written to
the vocabulary, so that they keep their ids: the tokenizers library would otherwise renumber them after the last entry.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from tokenizers import Tokenizer

from tongwen.core.byte_letters import byte_of, letter_of
from tongwen.core.errors import ModelError, RecipeError
from tongwen.core.i18n import _
from tongwen.vocab.learn import LearnedMerges
from tongwen.vocab.script import UNSPACED, Script, no_text_in_script

PLAIN_TOKEN = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}


def to_bytes(entry: str) -> bytes:
    """Return the bytes of a vocabulary entry, or the UTF-8 of a special token, which is not in byte characters."""
    try:
        return bytes(byte_of()[letter] for letter in entry)
    except KeyError:
        return entry.encode("utf-8")


def to_entry(piece: bytes) -> str:
    return "".join(letter_of()[byte] for byte in piece)


def is_byte_level(definition: dict[str, Any]) -> bool:
    """Whether a tokenizer.json is byte-level BPE."""
    return definition["model"]["type"] == "BPE" and "ByteLevel" in json.dumps(definition.get("decoder"))


def token_bytes_of(definition: dict[str, Any]) -> list[bytes]:
    """Return the bytes of every id, including added tokens; b"" for an id without a token."""
    vocabulary: dict[str, int] = definition["model"]["vocab"]
    added = {token["content"]: token["id"] for token in definition.get("added_tokens") or ()}
    out = [b""] * (1 + max([*vocabulary.values(), *added.values()]))
    for entry, index in vocabulary.items():
        out[index] = to_bytes(entry)
    for text, index in added.items():
        out[index] = text.encode("utf-8")
    return out


def count_words(tokenizer: Tokenizer, texts: Iterable[str], script: Script) -> dict[tuple[int, ...], int]:
    """Return word -> count, for the words that the base's normaliser and pre-tokeniser make of the texts.

    A word is a tuple of the base's token ids. Texts and words without the script are skipped. Raises DataError when no
    word is left.
    """
    words: Counter[str] = Counter()
    for text in texts:
        if script.occurs_in(text):
            normal = tokenizer.normalizer.normalize_str(text) if tokenizer.normalizer else text
            split = tokenizer.pre_tokenizer.pre_tokenize_str(normal) if tokenizer.pre_tokenizer else [(normal, (0, 0))]
            words.update(word for word, _ in split)
    if not words:
        raise no_text_in_script(script)
    out: Counter[tuple[int, ...]] = Counter()
    for word, count in words.items():
        if not word.isascii():  # no word of ASCII characters contains the script
            out[tuple(token.id for token in tokenizer.model.tokenize(word))] += count
    return {word: count for word, count in out.items() if len(word) > 1}


def extend(definition: dict[str, Any], learned: LearnedMerges) -> dict[str, Any]:
    """Return the tokenizer.json with the learned merges appended. Raises ModelError when a new id is taken."""
    model = definition["model"]
    vocabulary: dict[str, int] = dict(model["vocab"])
    for token in definition.get("added_tokens") or ():
        vocabulary.setdefault(token["content"], token["id"])
    used = set(vocabulary.values())
    for place, piece in enumerate(learned.pieces):
        entry, index = to_entry(piece), learned.first_new + place
        if entry in vocabulary or index in used:
            raise ModelError(
                _("the new piece {entry!r} collides with an existing token").format(entry=entry),
                place=f"id {index}",
            )
        vocabulary[entry] = index
    entries = {index: entry for entry, index in vocabulary.items()}
    pairs = [(entries[left], entries[right]) for left, right, _ in learned.merges]
    in_pairs = not model["merges"] or isinstance(model["merges"][0], list)
    new = [list(pair) for pair in pairs] if in_pairs else [" ".join(pair) for pair in pairs]
    return {**definition, "model": {**model, "vocab": vocabulary, "merges": [*model["merges"], *new]}}


def parts_of(learned: LearnedMerges) -> list[list[int]]:
    """Return for each new piece the old ids that it is made of."""
    parts: dict[int, list[int]] = {}
    for left, right, made in learned.merges:
        if made >= learned.first_new and made not in parts:
            parts[made] = [*parts.get(left, [left]), *parts.get(right, [right])]
    return list(parts.values())


def counts_of(learned: LearnedMerges) -> list[int]:
    """Return each new piece's count in the corpus at the time it was chosen."""
    counts: dict[int, int] = {}
    for (_unused, _unused2, made), count in zip(learned.merges, learned.counts, strict=True):
        if made >= learned.first_new:
            counts.setdefault(made, count)
    return list(counts.values())


def with_words(
    learned: LearnedMerges, token_bytes: list[bytes], words: Sequence[str], extended: Tokenizer
) -> LearnedMerges:
    """Append whole words to the learned merges. Each word is merged from the left out of its tokens in `extended`.

    extended: the base with the learned merges. In scripts that separate words by spaces, a word also gets a form with a
    leading space. Raises RecipeError for a word that the pre-tokeniser splits: merges cannot join it.
    """
    out = LearnedMerges(learned.first_new, list(learned.merges), list(learned.pieces), list(learned.counts))
    id_of = {piece: index for index, piece in reversed(list(enumerate(token_bytes)))}
    for form in forms_of(words):
        found: list[tuple[str, Any]] = (
            extended.pre_tokenizer.pre_tokenize_str(form) if extended.pre_tokenizer else [(form, None)]
        )
        split = [to_bytes(part).decode("utf-8", "replace") for part, _ in found]
        if len(split) != 1:
            raise RecipeError(
                _("the base's tokenizer splits {form!r} into {split}: it cannot become one piece").format(
                    form=form, split=split
                ),
                place="vocab.words",
                remedy=_("list it under special_tokens, or remove it"),
            )
        tokens = list(extended.encode(form, add_special_tokens=False).ids)
        for left, right, made in out.merges[len(learned.merges) :]:
            tokens = _joined(tokens, left, right, made)
        while len(tokens) > 1:
            left, right = tokens[:2]
            piece = _spelled(left, token_bytes, out) + _spelled(right, token_bytes, out)
            if piece not in id_of:
                id_of[piece] = out.first_new + len(out.pieces)
                out.pieces.append(piece)
            out.merges.append((left, right, id_of[piece]))
            out.counts.append(0)
            tokens = _joined(tokens, left, right, id_of[piece])
    return out


def forms_of(words: Sequence[str]) -> Iterator[str]:
    """Yield each word, and also with a leading space if its script separates words by spaces."""
    for word in words:
        yield word
        if word[0].isalpha() and not any(Script(name).occurs_in(word) for name in UNSPACED):
            yield f" {word}"


def with_special(definition: dict[str, Any], texts: Sequence[str]) -> dict[str, Any]:
    """Return the tokenizer.json with special tokens after all other tokens."""
    if not texts:
        return definition
    model = definition["model"]
    vocabulary, added = dict(model["vocab"]), list(definition.get("added_tokens") or ())
    for text in texts:
        index = 1 + max(vocabulary.values())
        vocabulary[text] = index
        added.append({"id": index, "content": text, "special": True, **PLAIN_TOKEN})
    return {**definition, "model": {**model, "vocab": vocabulary}, "added_tokens": added}


def _joined(tokens: list[int], left: int, right: int, made: int) -> list[int]:
    """Apply one merge to the tokens, from the left."""
    out: list[int] = []
    for token in tokens:
        if out and out[-1] == left and token == right:
            out[-1] = made
        else:
            out.append(token)
    return out


def _spelled(index: int, token_bytes: list[bytes], learned: LearnedMerges) -> bytes:
    return learned.pieces[index - learned.first_new] if index >= learned.first_new else token_bytes[index]
