"""Decide which bytes and characters belong to a script, and which pieces may be made of them.

A new piece is whole characters of one class, or the beginning of one character. A piece with half a character at its
end would fit hardly any text, and letters with punctuation would make two pieces of the same word. Text without the
script must keep its ids, so that the model's other languages do not change.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

from tongwen.core.errors import DataError
from tongwen.core.i18n import _

Ranges = tuple[tuple[int, int], ...]  # first and last code point, ascending

# Unicode 16, Blocks.txt. A mark is listed with a script if it occurs in hardly any other script's text.
HAN: Ranges = (
    (0x2E80, 0x2FDF),  # radicals
    (0x3005, 0x3007),
    (0x3021, 0x3029),
    (0x3038, 0x303B),
    (0x3400, 0x4DBF),
    (0x4E00, 0x9FFF),
    (0xF900, 0xFAFF),
    (0x20000, 0x323AF),
)
CJK_MARKS: Ranges = (
    (0x3000, 0x3004),
    (0x3008, 0x3020),
    (0x302A, 0x3037),
    (0x303C, 0x303F),
    (0xFE10, 0xFE1F),
    (0xFE30, 0xFE4F),
    (0xFF00, 0xFF0F),
    (0xFF1A, 0xFF20),
    (0xFF3B, 0xFF40),
    (0xFF5B, 0xFF64),
    (0xFFE0, 0xFFE6),
)
SCRIPTS: dict[str, tuple[Ranges, Ranges]] = {  # letters, marks
    "han": (HAN, CJK_MARKS),
    "japanese": (
        tuple(sorted((*HAN, (0x3041, 0x309F), (0x30A0, 0x30FF), (0x31F0, 0x31FF), (0xFF65, 0xFF9F)))),
        CJK_MARKS,
    ),
    "hangul": (((0x1100, 0x11FF), (0x3130, 0x318F), (0xA960, 0xA97F), (0xAC00, 0xD7FF)), ()),
    "cyrillic": (((0x0400, 0x052F), (0x1C80, 0x1C8F), (0x2DE0, 0x2DFF), (0xA640, 0xA69F)), ()),
    "greek": (((0x0370, 0x03FF), (0x1F00, 0x1FFF)), ()),
    "arabic": (((0x0600, 0x06FF), (0x0750, 0x077F), (0x08A0, 0x08FF), (0xFB50, 0xFDFF), (0xFE70, 0xFEFF)), ()),
    "hebrew": (((0x0590, 0x05FF), (0xFB1D, 0xFB4F)), ()),
    "devanagari": (((0x0900, 0x097F), (0xA8E0, 0xA8FF)), ()),
    "bengali": (((0x0980, 0x09FF),), ()),
    "tamil": (((0x0B80, 0x0BFF),), ()),
    "thai": (((0x0E00, 0x0E7F),), ()),
    "lao": (((0x0E80, 0x0EFF),), ()),
    "tibetan": (((0x0F00, 0x0FFF),), ()),
    "burmese": (((0x1000, 0x109F), (0xA9E0, 0xA9FF), (0xAA60, 0xAA7F)), ()),
    "georgian": (((0x10A0, 0x10FF), (0x1C90, 0x1CBF), (0x2D00, 0x2D2F)), ()),
    "khmer": (((0x1780, 0x17FF), (0x19E0, 0x19FF)), ()),
    "mongolian": (((0x1800, 0x18AF),), ()),
}
UNSPACED = ("japanese", "thai", "lao", "khmer", "burmese", "tibetan")  # no blanks between words; japanese includes han
LETTER, MARK = "letter", "mark"


@dataclass(frozen=True)
class Script:
    """A script by name, one of SCRIPTS."""

    name: str

    def class_of(self, code: int) -> str | None:
        """Return LETTER, MARK, or None for a code point outside the script."""
        letters, marks = SCRIPTS[self.name]
        return LETTER if _inside(letters, code) else MARK if _inside(marks, code) else None

    def spells(self, text: str) -> bool:
        """Whether a text consists of letters of the script only, or of its marks only."""
        classes = {self.class_of(ord(character)) for character in text}
        return len(classes) == 1 and None not in classes

    def begins(self, piece: bytes) -> bool:
        """Whether the bytes begin a character, and all characters with this beginning are in the script."""
        bounds = code_points_of(piece)
        return bounds is not None and any(
            first <= bounds[0] and bounds[1] <= last for first, last in _merged(*SCRIPTS[self.name])
        )

    def allows(self, piece: bytes) -> bool:
        """Whether the bytes may become a piece: whole characters of one class, or the beginning of one character."""
        try:
            return self.spells(piece.decode("utf-8"))
        except UnicodeDecodeError:
            return self.begins(piece)

    def occurs_in(self, text: str) -> bool:
        """Whether a text contains a letter of the script."""
        return _patterns(self.name)[0].search(text) is not None

    def touches(self, text: str) -> bool:
        """Whether a text contains a letter or a mark of the script."""
        return next(self.runs(text), None) is not None

    def runs(self, text: str) -> Iterator[str]:
        """Yield the longest runs of one class; a blank before letters belongs to the run."""
        return (found[0] for found in _patterns(self.name)[1].finditer(text))


def no_text_in_script(script: Script) -> DataError:
    """Return the error for a corpus from which no piece can be learned."""
    return DataError(
        _("the corpus contains no text in the script {script!r}").format(script=script.name),
        place="corpus",
        remedy=_("provide text in this script, or choose another: {scripts}").format(scripts=_(", ").join(SCRIPTS)),
    )


@lru_cache
def _patterns(name: str) -> tuple[re.Pattern[str], re.Pattern[str]]:
    """Return the patterns of (a letter, a run) of a script."""
    letters, marks = ("".join(f"\\U{first:08x}-\\U{last:08x}" for first, last in ranges) for ranges in SCRIPTS[name])
    return re.compile(f"[{letters}]"), re.compile(f" ?[{letters}]+" + (f"|[{marks}]+" if marks else ""))


def code_points_of(start: bytes) -> tuple[int, int] | None:
    """Return the first and last code point whose UTF-8 starts with these bytes but is longer; None without any."""
    lead = start[0]
    length, bits = (
        (2, lead & 0x1F) if 0xC2 <= lead <= 0xDF else (3, lead & 0x0F) if 0xE0 <= lead <= 0xEF else (4, lead & 0x07)
    )
    if not 0xC2 <= lead <= 0xF4 or len(start) >= length or any(byte >> 6 != 0b10 for byte in start[1:]):
        return None
    for byte in start[1:]:
        bits = bits << 6 | byte & 0x3F
    rest = 6 * (length - len(start))
    return bits << rest, (bits + 1 << rest) - 1


def _inside(ranges: Ranges, code: int) -> bool:
    place = bisect_right(ranges, (code, 0x10FFFF))
    return place > 0 and ranges[place - 1][0] <= code <= ranges[place - 1][1]


def _merged(*several: Ranges) -> list[tuple[int, int]]:
    """Return the ranges of all classes, with adjacent ones merged: a beginning may be shared by letters and marks."""
    out: list[tuple[int, int]] = []
    for first, last in sorted(one for ranges in several for one in ranges):
        if out and first == out[-1][1] + 1:
            out[-1] = (out[-1][0], last)
        else:
            out.append((first, last))
    return out
