"""Train a tokenizer from scratch: SentencePiece, or byte-level BPE of the tokenizers library.

By default SentencePiece silently skips lines of more than 4,192 bytes. Texts are passed line by line here with a higher
limit, so no line is skipped.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from tongwen.core import console
from tongwen.core.errors import DataError, MissingPackage, RecipeError
from tongwen.core.i18n import _
from tongwen.core.model_families import PATTERNS

END = "<|endoftext|>"
SENTENCES = 5_000_000  # SentencePiece keeps its lines in memory; from more lines it samples


def train_byte_level(texts: Iterable[str], pieces: int) -> Tokenizer:
    """Train byte-level BPE of at most `pieces` tokens. Raises DataError when the corpus is empty."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            *(pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in PATTERNS["qwen2"]),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=pieces,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    lines = _Lines(texts)
    tokenizer.train_from_iterator(lines, trainer)
    lines.check()
    return tokenizer


def train_sentencepiece(texts: Iterable[str], pieces: int, kind: str, seed: int) -> Any:
    """Train a SentencePiece model like LLaMA's (identity normaliser, byte fallback, split digits); returns its bytes.

    kind: bpe or unigram. Raises DataError when the corpus is empty, RecipeError when it is too small for the pieces.
    """
    try:
        import sentencepiece
    except ImportError:
        raise MissingPackage("sentencepiece", _("training a SentencePiece model"), "sentencepiece") from None
    sentencepiece.set_random_generator_seed(seed)
    out = io.BytesIO()
    lines = _Lines(texts)
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=out,
            vocab_size=pieces,
            model_type=kind,
            character_coverage=0.9995,
            byte_fallback=True,
            split_digits=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            max_sentence_length=1 << 30,
            input_sentence_size=SENTENCES,
            shuffle_input_sentence=True,
            minloglevel=2,
        )
    except RuntimeError as error:
        lines.check()
        reason = str(error).split("] ")[-1].split(" Increase")[0]
        raise RecipeError(
            _("SentencePiece cannot make {pieces:,} pieces: {reason}").format(pieces=pieces, reason=reason),
            place="--pieces",
            remedy=_("choose another number of pieces, or add text"),
        ) from None
    if lines.count > SENTENCES:
        console.notice(
            _("SentencePiece learned from {sentences:,} randomly chosen lines of {count:,}").format(
                sentences=SENTENCES, count=lines.count
            )
        )
    return out.getvalue()


class _Lines:
    """Iterates over the non-empty lines of texts and counts them."""

    def __init__(self, texts: Iterable[str]) -> None:
        self.texts, self.count = texts, 0

    def __iter__(self) -> Iterator[str]:
        for text in self.texts:
            for line in text.splitlines():
                if line.strip():
                    self.count += 1
                    yield line

    def check(self) -> None:
        if not self.count:
            raise DataError(_("the corpus is empty"), place="corpus")
