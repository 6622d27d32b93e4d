"""Measure a tokenizer: fertility, round trips, ids that must not change, pieces that are never produced.

`advise` then decides whether an extension pays. It compares the cost per character before and after, with the head, on
held-out text, and the loss of the extended, untrained model in bits per byte.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tongwen.core.i18n import _
from tongwen.vocab.script import Script

Ids = list[list[int]]
CURVE = (1_000, 2_000, 4_000, 8_000, 16_000)
SEEN_ENOUGH = 100  # occurrences in the corpus that should be enough to learn a row in one pass
WORTH = 0.25  # share of the cost per character that extension must save
# Texts that tokenizers get wrong: rare Han, emoji, full-width and half-width forms, control characters, spaces.
PROBES = (
    "𠮷野家の𪚥龘靐",
    "👩‍👩‍👧‍👦🏳️‍🌈👍🏽",
    "ＡＢＣ１２３，。！",
    "ｶﾀｶﾅ ㈱ ㎡ ½",
    "a\u0000b\u0007c\u001bd",
    "\ttab\r\nline\n\n\n",
    "  two  spaces  ",
    "\u200b\u200e\ufeff",
    "é e\u0301 ñ",
    "𝒳 ∑ ≠ → “quotes” – —",
    "한국어 עברית العربية ไทย",
    "\ufffd\ue000",
)
BROKEN = (b"\xff\xfe", b"\xe4\xbd", b"ok \xf0\x9f\x98 ok")  # invalid UTF-8, read with replacement characters
EXAMPLE = 60  # characters
ENGLISH = """A tokenizer cuts a text into pieces that the model has rows for. The fewer pieces a sentence needs, the more of it
fits into the context, and the less each character costs. It's 21°C outside; the train leaves at 17:45, doesn't it?
In 2023 many people taught Chinese to models that had hardly seen any: 1,234 pieces here, 17,953 there.
"""
CODE = """def mean(values: list[float]) -> float:
    \"\"\"The arithmetic mean.\"\"\"
    total = sum(value for value in values if value == value)
    return total / max(len(values), 1)  # 0.0 for nothing

for (let i = 0; i < rows.length; i++) { rows[i].id = `${prefix}-${i}`; }
SELECT name, COUNT(*) AS n FROM people WHERE age >= 18 GROUP BY name ORDER BY n DESC LIMIT 10;
"""


@dataclass(frozen=True)
class MeasuredTokenizer:
    """The parts of a tokenizer that are measured.

    encode:        encodes whole texts, without special tokens
    encode_inside: encodes texts as they would be in the middle of a text
    token_bytes:     the bytes of each id
    special:       ids of special tokens
    """

    name: str
    encode: Callable[[Sequence[str]], Ids]
    encode_inside: Callable[[Sequence[str]], Ids]
    decode: Callable[[list[int]], str]
    token_bytes: list[bytes]
    special: frozenset[int] = frozenset()

    @property
    def size(self) -> int:
        return len(self.token_bytes)


def fertility(tokenizer: MeasuredTokenizer, texts: Sequence[str]) -> dict[str, float]:
    """Count characters, UTF-8 bytes and tokens of the texts, and compute their ratios."""
    characters, size = sum(map(len, texts)), sum(len(text.encode("utf-8", "replace")) for text in texts)
    tokens = sum(map(len, tokenizer.encode(texts)))
    return {
        "characters": characters,
        "bytes": size,
        "tokens": tokens,
        "characters_per_token": characters / max(tokens, 1),
        "bytes_per_token": size / max(tokens, 1),
    }


def changed(old: MeasuredTokenizer, new: MeasuredTokenizer, texts: Sequence[str]) -> list[int]:
    """Return the indices of texts whose ids differ."""
    return [place for place, (a, b) in enumerate(zip(old.encode(texts), new.encode(texts), strict=True)) if a != b]


def round_trip_failures(tokenizer: MeasuredTokenizer, texts: Sequence[str]) -> list[int]:
    """Return the indices of texts that do not decode to themselves."""
    encoded = tokenizer.encode(texts)
    return [
        place for place, (text, ids) in enumerate(zip(texts, encoded, strict=True)) if tokenizer.decode(ids) != text
    ]


def probes() -> list[str]:
    return [*PROBES, *(piece.decode("utf-8", "replace") for piece in BROKEN)]


def pieces_in_use(tokenizer: MeasuredTokenizer, first_new: int, texts: Sequence[str]) -> dict[str, int]:
    """Count the pieces from `first_new` on, without special tokens: all, those in the texts, those that can never be
    produced, and those that are only the beginning of a character.

    A piece that its own text does not give is never produced: surrounding text can only take parts of it away.
    """
    new = [index for index in range(first_new, tokenizer.size) if index not in tokenizer.special]
    counts = Counter(token for ids in tokenizer.encode(texts) for token in ids if token >= first_new)
    whole, beginnings = [], 0
    for index in new:
        try:
            whole.append((index, tokenizer.token_bytes[index].decode("utf-8")))
        except UnicodeDecodeError:
            beginnings += 1
    encoded = tokenizer.encode_inside([text for _, text in whole])
    unreachable = sum(ids != [index] for (index, _), ids in zip(whole, encoded, strict=True))
    return {"pieces": len(new), "occur": len(counts), "unreachable": unreachable, "beginnings": beginnings}


def seconds_per_megabyte(tokenizer: MeasuredTokenizer, texts: Sequence[str]) -> float:
    """Return the CPU seconds to encode a million bytes, the best of three runs."""
    size = sum(len(text.encode("utf-8", "replace")) for text in texts)
    best = float("inf")
    for _index in range(3):
        began = time.process_time()
        tokenizer.encode(texts)
        best = min(best, time.process_time() - began)
    return best / max(size, 1) * 1e6


@dataclass(frozen=True)
class ModelSize:
    """The sizes that set a token's cost. body: parameters without embedding and head; hidden: width of the head."""

    name: str
    body: int
    hidden: int

    def per_token(self, vocabulary: int) -> float:
        """Return a token's multiply-adds: the body, and one row of the head per vocabulary entry (constant factors, 2
        operations x 3 passes, cancel out)."""
        return self.body + self.hidden * vocabulary


# For a tokenizer without its model. Qwen3-8B's: 36 layers, hidden 4096.
NOMINAL = ModelSize("8B", 6_950_000_000, 4096)


@dataclass(frozen=True)
class CurvePoint:
    """One point of the curve. seen_enough: how many of the pieces occur SEEN_ENOUGH times in the corpus."""

    pieces: int
    characters_per_token: float
    cost: float  # per character, relative to the base
    seen_enough: int


def make_curve(
    base: MeasuredTokenizer, shape: ModelSize, texts: Sequence[str], steps: Sequence[tuple[int, MeasuredTokenizer, int]]
) -> tuple[CurvePoint, list[CurvePoint]]:
    """Return (the base's point, a point for each (pieces, tokenizer, seen enough)) on held-out texts."""
    start = fertility(base, texts)["characters_per_token"]
    old = shape.per_token(base.size) / start
    points = []
    for pieces, tokenizer, seen in steps:
        found = fertility(tokenizer, texts)["characters_per_token"]
        points.append(CurvePoint(pieces, found, shape.per_token(tokenizer.size) / found / old, seen))
    return CurvePoint(0, start, 1.0, 0), points


@dataclass(frozen=True)
class VocabularyAdvice:
    """extend: whether it pays; pieces: how many; saving: share of the cost per character that it saves."""

    extend: bool
    pieces: int
    saving: float
    reasons: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        return {"extend": self.extend, "pieces": self.pieces, "saving": self.saving, "reasons": list(self.reasons)}


def advise(
    base: CurvePoint, curve: Sequence[CurvePoint], damage: float | None = None, requested: int | None = None
) -> VocabularyAdvice:
    """Advise whether to extend the vocabulary, from the curve and the damage.

    damage:    bits per byte of the extended, untrained model relative to the base's, minus 1; None without a model
    requested: the user's number of pieces; by default the cheapest point for which the corpus can train the rows

    An extension pays when a character costs at least WORTH less. Below that, published runs gained nothing but speed,
    and had to train the new rows first (EEVE-Korean needed 2 billion tokens for 8,960 rows; LLaMA Beyond English and
    Chinese-LLaMA-Alpaca-3 did better without). Speed cannot make up for a damage above the saving in bytes.
    """
    teachable = [point for point in curve if point.seen_enough >= 0.9 * point.pieces] or list(curve[:1])
    wanted = [point for point in curve if point.pieces == requested] if requested else teachable
    best = min(wanted or teachable, key=lambda point: point.cost)
    saving = 1 - best.cost
    longer = best.characters_per_token / base.characters_per_token
    reasons = [
        _(
            "with {pieces:,} new pieces, {base_characters_per_token:.2f} characters per token become {best_characters_per_token:.2f}: the same context holds {longer:.2f} times the text"
        ).format(
            base_characters_per_token=base.characters_per_token,
            best_characters_per_token=best.characters_per_token,
            pieces=best.pieces,
            longer=longer,
        ),
        _(
            "a character costs {saving:.0%} less to process, including the larger head; {worth:.0%} is needed to pay for training the new rows"
        ).format(saving=saving, worth=WORTH),
    ]
    if best.seen_enough < 0.9 * best.pieces:
        reasons.append(
            _(
                "only {enough:,} of the {pieces:,} pieces occur at least {min_count} times in the corpus: use more text or fewer pieces"
            ).format(enough=best.seen_enough, pieces=best.pieces, min_count=SEEN_ENOUGH)
        )
    bearable = damage is None or damage <= longer - 1
    if damage is not None:
        if bearable:
            reason = _(
                "before training, the extended model changes bits per byte by {damage:+.1%}; training can recover that"
            )
        else:
            reason = _(
                "before training, the extended model changes bits per byte by {damage:+.1%}; that is more than the shorter text can recover"
            )
        reasons.append(reason.format(damage=damage))
    return VocabularyAdvice(saving >= WORTH and bearable, best.pieces, saving, tuple(reasons))


def survey(
    base: MeasuredTokenizer, new: MeasuredTokenizer | None, texts: dict[str, list[str]], script: Script
) -> dict[str, Any]:
    """Return the parts of report.json that need no model: fertility by text, unchanged behaviour, and examples."""
    out: dict[str, Any] = {"fertility": {}, "sizes": {"before": base.size}}
    for name, some in {**texts, "English": [ENGLISH], "code": [CODE]}.items():
        out["fertility"][name] = {"before": fertility(base, some)}
        if new:
            out["fertility"][name]["after"] = fertility(new, some)
    if new is None:
        return out
    samples = [text for some in texts.values() for text in some]
    foreign = [text for text in samples if not script.touches(text)] + [*ENGLISH.splitlines(), *CODE.splitlines()]
    round_trips = probes() + samples
    worse = set(round_trip_failures(new, round_trips)) - set(round_trip_failures(base, round_trips))
    old_speed, new_speed = seconds_per_megabyte(base, samples), seconds_per_megabyte(new, samples)
    out["sizes"]["after"] = new.size
    out["kept"] = {
        "source_texts": len(foreign),
        "source_changed": len(changed(base, new, foreign)),
        "round_trips": len(round_trips),
        "new_round_trip_failures": len(worse),
        **pieces_in_use(new, base.size, samples),
        "speed": new_speed / max(old_speed, 1e-9),
    }
    shown = [text.strip()[:EXAMPLE] for text in samples if script.occurs_in(text) and len(text) >= EXAMPLE][:3]
    out["examples"] = [{"before": pieces_of(base, text), "after": pieces_of(new, text)} for text in shown]
    return out


def pieces_of(tokenizer: MeasuredTokenizer, text: str) -> list[str]:
    """Return the tokens of a text in readable form; incomplete characters as hexadecimal bytes."""
    out = []
    for index in tokenizer.encode([text])[0]:
        piece = tokenizer.token_bytes[index]
        try:
            out.append(piece.decode("utf-8"))
        except UnicodeDecodeError:
            out.append(piece.hex(" "))
    return out
