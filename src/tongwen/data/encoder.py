"""Encode texts and rendered spans to token ids; boundaries are exact for every tokenizer.

Each prompt part and each answer is tokenised separately, as at inference: the prompt is tokenised whole, then the tokens of
the answer follow one by one. So no token crosses a boundary, and the mask depends on positions, never on comparing ids
(pad = eos is common and harmless). If a tokenizer puts a space before every text (SentencePiece's dummy prefix), a
continuation is tokenised after an anchor, and the tokens of the anchor are removed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from tongwen.core import console
from tongwen.core.control_tokens import APART
from tongwen.core.errors import ModelError
from tongwen.core.i18n import _
from tongwen.core.records import Span
from tongwen.data.tiktoken_encoder import TiktokenEncoder, Unproven, make_tiktoken_encoder

ANCHORS = ("\n", ":", "a")
FAST_FROM = 500  # texts from which a faster encoder pays off: creating it takes a second or two

Ids = Sequence[int] | np.ndarray


class Piece(NamedTuple):
    """Ids of a part of a text, whether they are learned, and whether they belong to an answer."""

    ids: Ids
    learn: bool
    answer: bool = False


class Encoder:
    """A tokenizer with its prefix and its way to continue a text.

    tokenizer: a fast transformers tokenizer
    prefix:    ids that the tokenizer itself puts before a text, such as `<s>`; written exactly once
    anchor:    text before a continuation when it is tokenised; "" if the tokenizer adds no space, or if the model was
               trained with the space (ChatGLM)
    """

    def __init__(self, tokenizer: Any) -> None:
        self.backend: Any = getattr(tokenizer, "backend_tokenizer", None) or getattr(tokenizer, "_tokenizer", None)
        if self.backend is None:
            raise ModelError(
                _("this tokenizer has no fast form (tokenizer.json)"),
                place=type(tokenizer).__name__,
                remedy="AutoTokenizer.from_pretrained(…).save_pretrained(…)",
            )
        self.fast: TiktokenEncoder | None = None
        self._fast_searched = False
        self.prefix = prefix_of(tokenizer)
        self.anchor = "" if getattr(tokenizer, "answers_start_with_space", False) else self._find_anchor()

    def _ids(self, texts: list[str]) -> list[Ids]:
        if not self._fast_searched and len(texts) >= FAST_FROM:
            self.fast, self._fast_searched = self._find_fast(texts[:FAST_FROM]), True
        if self.fast is None:
            return self._slow_ids(texts)
        out = self.fast.encode_all(texts)
        rest = [place for place, ids in enumerate(out) if ids is None]
        for place, ids in zip(rest, self._slow_ids([texts[place] for place in rest]), strict=True):
            out[place] = np.array(ids, np.uint32)
        return out  # type: ignore[return-value]

    def _slow_ids(self, texts: list[str]) -> list[Ids]:
        return [encoding.ids for encoding in self.backend.encode_batch_fast(texts, add_special_tokens=False)]

    def _find_fast(self, texts: list[str]) -> TiktokenEncoder | None:
        """Return tiktoken with the same vocabulary, if it provably gives the same ids and does so for these texts."""
        try:
            fast = make_tiktoken_encoder(self.backend)
        except Unproven as reason:
            console.info(
                _("the tokenizers library encodes the texts; tiktoken would be faster, but {reason}").format(
                    reason=reason
                )
            )
            return None
        for text, wanted in zip(texts, self._slow_ids(texts), strict=True):
            found = fast.encode(text)
            if found is not None and found.tolist() != wanted:
                console.notice(
                    _("tiktoken splits {text!r} differently; using the tokenizers library instead").format(
                        text=text[:20]
                    )
                )
                return None
        return fast

    def _find_anchor(self) -> str:
        """Return a text after which a continuation gets no dummy prefix space; "" when the tokenizer adds none."""
        alone = self._slow_ids(["是"])[0]
        for anchor in ANCHORS:
            head, joined = self._slow_ids([anchor, f"{anchor}是"])
            if list(joined) == [*head, *alone]:
                return ""
        return ANCHORS[0]

    def _continue(self, text: str, piece: Ids) -> Ids:
        """Return the ids of a continuation; piece: the ids of the usual anchor and the text."""
        for anchor in ANCHORS:
            head = list(self._ids([anchor])[0])
            joined = piece if anchor == self.anchor else self._ids([anchor + text])[0]
            if list(joined[: len(head)]) == head:
                return joined[len(head) :]
        raise ModelError(
            _("the tokenizer cannot continue a text with {text!r}").format(text=text[:20]),
            place=type(self.backend).__name__,
        )

    def encode(self, samples: Sequence[Sequence[Span]]) -> list[list[Piece]]:
        """Return the pieces of each sample. All texts are tokenised in one call of the library."""
        joined = [join_spans(spans) for spans in samples]
        if not self.anchor:
            encoded = iter(self._ids([span.text for spans in joined for span in spans]))
            out = [[Piece(next(encoded), span.learn, span.answer) for span in spans] for spans in joined]
        else:
            out = self._encode_with_anchor(joined)
        return [self.with_prefix(pieces) for pieces in out] if self.prefix else out

    def _encode_with_anchor(self, samples: list[list[Span]]) -> list[list[Piece]]:
        head = list(self._ids([self.anchor])[0])
        encoded = iter(
            self._ids(
                [
                    self.anchor + span.text if number else span.text
                    for spans in samples
                    for number, span in enumerate(spans)
                ]
            )
        )
        out = []
        for spans in samples:
            pieces = []
            for number, span in enumerate(spans):
                ids = next(encoded)
                if number:
                    ids = ids[len(head) :] if list(ids[: len(head)]) == head else self._continue(span.text, ids)
                pieces.append(Piece(ids, span.learn, span.answer))
            out.append(pieces)
        return out

    def encode_texts(self, texts: list[str]) -> list[Ids]:
        """Return the ids of each text, without the tokenizer's prefix."""
        return self._ids(texts)

    def encode_prompt(self, text: str) -> list[int]:
        """Return the ids of a prompt, the same as in training; the parts between APART are tokenised separately."""
        first, *rest = text.split(APART)
        ids = [index for piece in self.encode([[Span(first, False)]])[0] for index in piece.ids]
        for part in rest:
            piece = self._ids([self.anchor + part])[0]
            ids += self._continue(part, piece) if self.anchor else piece
        return [int(index) for index in ids]

    def keeps_stop(self, pieces: Sequence[Piece]) -> bool:
        """Whether the tokens of a sample contain the stop of its last answer: always true, except in LegacyEncoder."""
        return True

    def with_prefix(self, pieces: list[Piece]) -> list[Piece]:
        """Return the pieces with the tokenizer's prefix exactly once, whether or not the template writes it."""
        count = len(self.prefix)
        first = pieces[0]
        if list(first.ids[:count]) != self.prefix:
            return [Piece(self.prefix, learn=False), *pieces]
        if list(first.ids[count : 2 * count]) == self.prefix:
            return [first._replace(ids=first.ids[count:]), *pieces[1:]]
        return pieces


def prefix_of(tokenizer: Any) -> list[int]:
    """Return the ids that a tokenizer puts before every text: `<s>` for LLaMA, nothing for Qwen and BLOOM."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    for start in range(len(whole) - len(bare) + 1):
        if whole[start : start + len(bare)] == bare:
            return list(whole[:start])
    return []


def join_spans(spans: Iterable[Span]) -> list[Span]:
    """Join neighbouring spans with the same `learn` and `answer`: each result is tokenised together."""
    out: list[Span] = []
    for span in spans:
        if not span.text:
            continue
        if out and (out[-1].learn, out[-1].answer) == (span.learn, span.answer):
            out[-1] = Span(out[-1].text + span.text, span.learn, span.answer, span.stop)
        else:
            out.append(span)
    return out
