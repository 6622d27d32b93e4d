"""Rendered spans become token ids with a mask of what is learned: boundaries exact for every tokenizer.

Each stretch of prompt and each answer is tokenised by itself, because that is what happens at inference: the prompt
is tokenised whole, the answer's tokens follow one by one. So no token ever straddles the border, and the mask is a
matter of position, never of comparing ids (pad = eos is usual and harmless here). Where a tokenizer puts a blank
before every text it is given (SentencePiece's dummy prefix), a continuation is tokenised behind an anchor that is
cut off again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np

from tongwen.data.ledger import Ledger
from tongwen.data.read import Rejected
from tongwen.errors import DataError, ModelError, RowRefused
from tongwen.language import say
from tongwen.recipe.schema import Sft
from tongwen.record import Dialogue, Origin, Span
from tongwen.template import Rendered, Template

ANCHORS = ("\n", ":", "a")
BATCH = 1000  # dialogues tokenised in one call of the tokenizer library


@dataclass(frozen=True)
class TokenStore:
    """Samples laid end to end.

    ids:     (N,) uint32, all tokens
    learn:   (N,) bool, whether the token is a target of the loss (the first of a sample never is)
    offsets: (S + 1,) int64, where each sample begins
    origins: per sample, the row that it came from
    stops:   (S,) bool, whether a learned stop token ends something in the sample
    """

    ids: np.ndarray
    learn: np.ndarray
    offsets: np.ndarray
    origins: tuple[Origin, ...]
    stops: np.ndarray

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> np.ndarray:
        """(S,) tokens per sample."""
        return np.diff(self.offsets)

    def sample(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """(ids, learn) of one sample."""
        begin, end = self.offsets[index], self.offsets[index + 1]
        return self.ids[begin:end], self.learn[begin:end]

    @property
    def learned_tokens(self) -> int:
        return int(self.learn.sum())


class Encoder:
    """A tokenizer with its prefix and the rule for continuing a text.

    tokenizer: a fast transformers tokenizer
    prefix:    ids that the tokenizer itself puts before a text, such as `<s>`; said exactly once
    """

    def __init__(self, tokenizer: Any) -> None:
        self.backend: Any = getattr(tokenizer, "backend_tokenizer", None) or getattr(tokenizer, "_tokenizer", None)
        if self.backend is None:
            raise ModelError(
                say("this tokenizer has no fast form (tokenizer.json)", "该分词器没有快速形式（tokenizer.json）"),
                place=type(tokenizer).__name__,
                remedy="AutoTokenizer.from_pretrained(…).save_pretrained(…)",
            )
        self.prefix = prefix_of(tokenizer)
        self.anchor = self._find_anchor()

    def _ids(self, texts: list[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self.backend.encode_batch_fast(texts, add_special_tokens=False)]

    def _find_anchor(self) -> str:
        """A text after which a continuation is tokenised without a dummy blank; "" when none is ever added."""
        alone = self._ids(["是"])[0]
        for anchor in ANCHORS:
            head, joined = self._ids([anchor, f"{anchor}是"])
            if joined == head + alone:
                return ""
        return ANCHORS[0]

    def _continue(self, text: str, piece: list[int]) -> list[int]:
        """The ids of a continuation; piece holds the ids of the usual anchor and the text."""
        for anchor in ANCHORS:
            head, joined = self._ids([anchor])[0], piece if anchor == self.anchor else self._ids([anchor + text])[0]
            if joined[: len(head)] == head:
                return joined[len(head) :]
        raise ModelError(
            say(f"the tokenizer cannot continue a text with {text[:20]!r}", f"分词器无法以 {text[:20]!r} 接续文本"),
            place=type(self.backend).__name__,
        )

    def encode(self, samples: Sequence[Sequence[Span]]) -> list[tuple[list[int], list[bool]]]:
        """(ids, learn) of each sample. All texts go through the tokenizer library in one call."""
        texts: list[str] = []
        layout: list[list[tuple[bool, bool]]] = []  # per sample: (learned, continued) of each segment
        for spans in samples:
            segments = join_spans(spans)
            layout.append([(learned, number > 0) for number, (_, learned) in enumerate(segments)])
            texts += [self.anchor + text if number else text for number, (text, _) in enumerate(segments)]
        encoded = iter(zip(texts, self._ids(texts), strict=True))
        head = self._ids([self.anchor])[0] if self.anchor else []
        out = []
        for segments_of in layout:
            ids: list[int] = []
            learn: list[bool] = []
            for learned, continued in segments_of:
                text, piece = next(encoded)
                if continued and head:
                    at_border = piece[: len(head)] == head
                    piece = piece[len(head) :] if at_border else self._continue(text[len(self.anchor) :], piece)
                ids += piece
                learn += [learned] * len(piece)
            out.append(self._with_prefix(ids, learn))
        return out

    def encode_prompt(self, text: str) -> list[int]:
        """Ids of a prompt, as training sees the same text before an answer."""
        return self.encode([[Span(text, False)]])[0][0]

    def _with_prefix(self, ids: list[int], learn: list[bool]) -> tuple[list[int], list[bool]]:
        """The tokenizer's own prefix exactly once, whether or not the template writes it."""
        count = len(self.prefix)
        if not count:
            return ids, learn
        if ids[:count] != self.prefix:
            return [*self.prefix, *ids], [False] * count + learn
        if ids[count : 2 * count] == self.prefix:
            return ids[count:], learn[count:]
        return ids, learn


def prefix_of(tokenizer: Any) -> list[int]:
    """The ids that a tokenizer puts before a text by itself: `<s>` for LLaMA, nothing for Qwen and BLOOM."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    for start in range(len(whole) - len(bare) + 1):
        if whole[start : start + len(bare)] == bare:
            return list(whole[:start])
    return []


def join_spans(spans: Iterable[Span]) -> list[tuple[str, bool]]:
    """Neighbouring spans with the same fate become one text: (text, learned)."""
    out: list[tuple[str, bool]] = []
    for span in spans:
        if not span.text:
            continue
        if out and out[-1][1] == span.learn:
            out[-1] = (out[-1][0] + span.text, span.learn)
        else:
            out.append((span.text, span.learn))
    return out


def encode_dialogues(
    dialogues: Iterable[Dialogue],
    template: Template,
    encoder: Encoder,
    section: Sft,
    ledger: Ledger,
    reject: Callable[[Rejected], None],
) -> TokenStore:
    """All samples of the dialogues. Too long or unrenderable ones are handed to `reject` and counted in the ledger;
    nothing is ever cut. A row counts as kept when at least one of its samples is; tokens are counted per sample."""
    ids: list[np.ndarray] = []
    masks: list[np.ndarray] = []
    origins: list[Origin] = []
    stops: list[bool] = []
    stream = iter(dialogues)
    while chunk := list(islice(stream, BATCH)):
        rendered: list[tuple[Dialogue, list[Rendered]]] = []
        for dialogue in chunk:
            try:
                rendered.append((dialogue, template.samples(dialogue, section.learn, section.thinking)))
            except RowRefused as error:
                ledger.enter(0)
                ledger.lose(error.reason, 0)
                reject(Rejected(dialogue.origin, error.reason, error.rule, dialogue.to_dict()))
        encoded = iter(encoder.encode([sample.spans for _, samples in rendered for sample in samples]))
        for dialogue, samples in rendered:
            kept = 0
            reason = ""
            for sample in samples:
                sample_ids, sample_learn = next(encoded)
                size = len(sample_ids)
                ledger.enter(size, things=0)
                unfit, rule = _unfit(size, sample_learn, section.max_length)
                if unfit:
                    reason = unfit
                    ledger.lose(unfit, size, things=0)
                    reject(Rejected(dialogue.origin, unfit, rule, dialogue.to_dict()))
                    continue
                kept += 1
                ledger.keep(size, things=0)
                ids.append(np.asarray(sample_ids, dtype=np.uint32))
                masks.append(np.asarray(sample_learn, dtype=bool))
                masks[-1][0] = False  # nothing stands before the first token, so it cannot be a target
                origins.append(dialogue.origin)
                stops.append(any(span.stop and span.learn for span in sample.spans))
            ledger.enter(0)
            if kept:
                ledger.keep(0)
            else:
                ledger.lose(reason, 0)
    offsets = np.concatenate([[0], np.cumsum([len(part) for part in ids], dtype=np.int64)]).astype(np.int64)
    return TokenStore(
        np.concatenate(ids) if ids else np.zeros(0, np.uint32),
        np.concatenate(masks) if masks else np.zeros(0, bool),
        offsets,
        tuple(origins),
        np.asarray(stops, dtype=bool),
    )


def _unfit(size: int, learn: list[bool], max_length: int) -> tuple[str, str]:
    if size > max_length:
        return "too_long", say(
            f"{size} tokens, max_length is {max_length}", f"{size} 个 token，max_length 为 {max_length}"
        )
    if not any(learn[1:]):
        return "nothing_to_learn", say("no token of this sample is learned", "该样本没有要学习的 token")
    return "", ""


def check_store(store: TokenStore, section: Sft, rejected: Sequence[Rejected]) -> dict[str, Any]:
    """The mask's statistics. Raises DataError when nothing is left to learn, or too few samples learn to stop."""
    if not len(store):
        too_long = sum(bad.reason == "too_long" for bad in rejected)
        first = rejected[0] if rejected else None
        raise DataError(
            say(
                f"no sample is left to learn ({too_long} of {len(rejected)} are longer than max_length {section.max_length})"
                + (f"; the first: {first.rule}" if first else ""),
                f"没有可训练的样本（{len(rejected)} 个中有 {too_long} 个超过 max_length {section.max_length}）"
                + (f"；第一个：{first.rule}" if first else ""),
            ),
            place=str(first.origin) if first else "sft",
            remedy=say("raise sft.max_length, or shorten the samples", "增大 sft.max_length，或缩短样本"),
        )
    stops = float(store.stops.mean())
    if stops < section.min_stop_learned:
        raise DataError(
            say(
                f"only {stops:.1%} of the samples learn their stop token; the model would not learn to end its answers",
                f"只有 {stops:.1%} 的样本会学到停止符，模型学不会结束回答",
            ),
            place="sft.learn",
            remedy="sft: {learn: assistant}" + say(", or lower sft.min_stop_learned", "，或降低 sft.min_stop_learned"),
        )
    return {
        "tokens": len(store.ids),
        "learned_tokens": store.learned_tokens,
        "learned_share": round(store.learned_tokens / len(store.ids), 6),
        "samples": len(store),
        "stop_learned_share": round(stops, 6),
        "longest": int(store.lengths.max()),
        "mean_length": round(float(store.lengths.mean()), 2),
    }


def token_bytes(tokenizer: Any) -> np.ndarray:
    """(V,) int32: UTF-8 bytes that each token stands for, from the raw token; special tokens count 0.

    Byte-level BPE writes one character per byte; SentencePiece writes U+2581 for a blank and <0xNN> for a byte.
    """
    pieces: dict[str, int] = tokenizer.get_vocab()
    sizes = np.zeros(max(pieces.values()) + 1, dtype=np.int32)
    special = set(tokenizer.all_special_ids)
    added = getattr(tokenizer, "added_tokens_decoder", {})
    special |= {index for index, token in added.items() if token.special}
    sentencepiece = any(piece.startswith("\u2581") for piece in pieces) and "Ġ" not in pieces
    for piece, index in pieces.items():
        if index in special:
            continue
        if index in added:
            sizes[index] = len(str(added[index].content).encode())
        elif sentencepiece:
            is_byte = len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">")
            sizes[index] = 1 if is_byte else len(piece.replace("\u2581", " ").encode())
        else:
            sizes[index] = len(piece)
    return sizes
