"""Text that any terminal, file or pipe takes: control characters are shown escaped, and an encoding that lacks a character
gets another spelling of it."""

from __future__ import annotations

import codecs
import io
import re
import sys

# All control characters but newline and tab, overrides of the writing direction, and halves of a surrogate pair.
UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
# The signs of our messages, for encodings without them.
ASCII = {
    "✓": "+",
    "✗": "x",
    "·": "-",
    "…": "...",
    "→": "->",
    "−": "-",
    "›": ">",
    "│": "|",
    "—": "-",
    "–": "-",
    "≤": "<=",
    "⟦": "[[",
    "⟧": "]]",
}
DEGRADED = "tongwen.degraded"  # the name of the error handler


def visible(text: str) -> str:
    """Return the text with all characters escaped that a terminal would interpret."""
    return UNSAFE.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def use_any_encoding() -> None:
    """Let stdout and stderr spell what their encoding lacks: our signs in ASCII, other characters as `\\u4e2d`."""
    codecs.register_error(DEGRADED, _degrade)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=DEGRADED)


def _degrade(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    lacking = error.object[error.start : error.end]
    return "".join(ASCII.get(sign) or sign.encode("ascii", "backslashreplace").decode() for sign in lacking), error.end
