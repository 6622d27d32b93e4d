"""Learn new pieces from a corpus, and extend a tokenizer by pieces, words and special tokens."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from tokenizers import Tokenizer

from tongwen.core import console
from tongwen.core.errors import DataError, ModelError, RecipeError
from tongwen.core.i18n import _
from tongwen.vocab import bytelevel, spm
from tongwen.vocab.learn import LearnedMerges, learn_merges
from tongwen.vocab.script import Script
from tongwen.workflows.tokenizer_files import TokenizerFiles, encoder_of, from_model, open_tokenizer_files


@dataclass(frozen=True)
class ExtendedTokenizer:
    """A tokenizer with new tokens.

    files: the extended tokenizer; parts: for each new id, the old ids of the same text; seen: how often each learned
    piece occurred in the corpus when it was chosen.
    """

    files: TokenizerFiles
    first_new: int
    parts: list[list[int]]
    seen: list[int] = field(default_factory=list)

    @property
    def new_ids(self) -> range:
        return range(self.first_new, self.first_new + len(self.parts))


@dataclass(frozen=True)
class LearnedPieces:
    """Pieces learned from a corpus, most useful first, so that the first N can be taken for any N.

    found: merges for byte-level BPE, (piece, tokens saved) for SentencePiece.
    """

    base: TokenizerFiles
    script: Script
    found: Any

    def __len__(self) -> int:
        return len(self.found.pieces if self.base.model is None else self.found)

    def warn_if_fewer(self, pieces: int) -> None:
        if len(self) < pieces:
            console.notice(
                _(
                    "the corpus yields only {count:,} pieces, not {pieces:,}: no other pair in this script occurs twice"
                ).format(count=len(self), pieces=pieces)
            )

    def extended(self, pieces: int, words: Sequence[str] = (), special_tokens: Sequence[str] = ()) -> ExtendedTokenizer:
        """Return the base with the first learned pieces, then whole words, then special tokens.

        Raises RecipeError if a word is already a token or empty, or if the base's tokenizer would split it.
        """
        _check_new(self.base, [*words, *special_tokens])
        if self.base.model is None:
            return _extend_byte_level(self.base, self.found.first(pieces), words, special_tokens)
        return _extend_sentencepiece(self.base, self.found[:pieces], self.script, words, special_tokens)


def learn(
    base: TokenizerFiles,
    texts: Iterable[str],
    script: Script,
    most: int,
    on_progress: Callable[[int], None] = lambda done: None,
) -> LearnedPieces:
    """Learn at most `most` pieces. Raises DataError if the texts contain nothing in the script, ModelError if the base
    is not BPE."""
    if base.model is not None:
        spm.check_base(base.model, base.name)
        inside = encoder_of(spm.without_prefix(base.model))
        learned: LearnedMerges | list[tuple[str, int]] = (
            spm.learn_pieces(base.model, texts, script, inside, most, on_progress) if most else []
        )
    else:
        definition = base.definition
        token_bytes = bytelevel.token_bytes_of(definition)
        counted = bytelevel.count_words(base.backend, texts, script) if most else {}
        special = [token["content"].encode() for token in definition.get("added_tokens") or ()]
        learned = learn_merges(
            counted,
            token_bytes,
            script.allows,
            most,
            first_new=len(token_bytes),
            forbidden=special,
            progress=on_progress,
        )
    pieces = LearnedPieces(base, script, learned)
    if most and not len(pieces):
        raise DataError(
            _("no new piece can be learned: this tokenizer has every piece that the texts repeat"),
            place=base.name,
            remedy=_("use more text, or leave `vocab` out of the recipe"),
        )
    return pieces


def extended_by(base: TokenizerFiles, name: str) -> ExtendedTokenizer:
    """Open an extension of the base that was made elsewhere. Raises ModelError if it does not extend this base."""
    other = open_tokenizer_files(name)
    if base.model is None or other.model is None:
        raise ModelError(
            _("both must be SentencePiece models (tokenizer.model)"),
            place=f"vocab.tokenizer: {name}",
            remedy="vocab: {pieces: 2000}",
        )
    held = len(base.model.pieces)
    differing = next(
        (
            index
            for index, piece in enumerate(base.model.pieces)
            if index >= len(other.model.pieces) or other.model.pieces[index].piece != piece.piece
        ),
        None,
    )
    if differing is not None or len(other.model.pieces) == held:
        if differing is None:
            rule = _("it is not an extension of {base}: it has no more pieces")
        else:
            rule = _("it is not an extension of {base}: the pieces differ from id {differing} on")
        raise ModelError(
            rule.format(base=base.name, differing=differing),
            place=f"vocab.tokenizer: {name}",
            remedy="tongwen tokenizer merge --base BASE/tokenizer.model --add CHINESE.model --out DIR",
        )
    inside = encoder_of(spm.without_prefix(base.model))
    new = [piece.piece.replace(spm.BLANK, " ") for piece in other.model.pieces[held:]]
    return ExtendedTokenizer(replace(other, tokenizer=base.tokenizer), held, inside(new))


def _extend_byte_level(
    base: TokenizerFiles, learned: LearnedMerges, words: Sequence[str], special_tokens: Sequence[str]
) -> ExtendedTokenizer:
    seen = bytelevel.counts_of(learned)
    definition = bytelevel.extend(base.definition, learned)
    if words:
        extended = Tokenizer.from_str(json.dumps(definition))
        learned = bytelevel.with_words(learned, bytelevel.token_bytes_of(definition), words, extended)
        definition = bytelevel.extend(base.definition, learned)
    backend = Tokenizer.from_str(json.dumps(bytelevel.with_special(definition, special_tokens)))
    return ExtendedTokenizer(
        TokenizerFiles(base.name, backend, None, base.tokenizer),
        learned.first_new,
        [*bytelevel.parts_of(learned), *base.encode_fast(special_tokens)],
        seen,
    )


def _extend_sentencepiece(
    base: TokenizerFiles,
    found: list[tuple[str, int]],
    script: Script,
    words: Sequence[str],
    special_tokens: Sequence[str],
) -> ExtendedTokenizer:
    forms = list(bytelevel.forms_of(words))
    pieces = [piece for piece, _ in found]
    merged = (
        spm.merge(base.model, pieces, script, encoder_of, words=forms) if pieces or forms else spm.unchanged(base.model)
    )
    for text in special_tokens:
        merged.append_control(text)
    seen, inside = dict(found), encoder_of(spm.without_prefix(base.model))
    return ExtendedTokenizer(
        from_model(base, merged.model),
        len(base.model.pieces),
        inside([piece.replace(spm.BLANK, " ") for piece in merged.added]),
        [seen[piece] for piece in merged.added if piece in seen],
    )


def _check_new(base: TokenizerFiles, texts: Sequence[str]) -> None:
    known = set(base.definition["model"]["vocab"]) | {
        token["content"] for token in base.definition.get("added_tokens") or ()
    }
    for text in texts:
        if not text.strip() or text in known or texts.count(text) > 1:
            raise RecipeError(
                _("{text!r} is already a token, or empty").format(text=text),
                place="vocab.words / vocab.special_tokens",
                remedy=_("leave it out"),
            )
