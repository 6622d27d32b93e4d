"""Read a JSON array as rows while streaming: only the current element is in memory.

A valid JSON element that is not an acceptable row loses only that row. When the array itself is broken, the next row cannot
be found: reading ends with an error that names the position.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterator
from itertools import count
from typing import Any

from tongwen.core.errors import RowRejected
from tongwen.core.i18n import _
from tongwen.data.charset import Charset
from tongwen.data.files import DamagedFile
from tongwen.data.row import CAP, DECODER, LENIENT, RawRow, check_object, not_json

_BLANKS = re.compile(r"[ \t\r\n]*")


def read_array(blocks: Iterator[bytes], found: Charset, name: str) -> Iterator[RawRow]:
    """Yield the elements of a JSON array. Raises DamagedFile when the array is broken."""
    buffer = _Buffer(blocks, found.codec)
    buffer.letter()
    buffer.place += 1
    if buffer.letter() == "]":
        buffer.place += 1
    else:
        for number in count(1):
            yield _element(buffer, number, name, found)
            letter = buffer.letter()
            if letter not in (",", "]"):
                raise buffer.damaged(
                    _("this is not a complete JSON array: {letter} row {number}").format(
                        letter=_("{letter!r} follows").format(letter=letter) if letter else _("nothing follows"),
                        number=number,
                    )
                )
            buffer.place += 1
            if letter == "]":
                break
    if buffer.letter():
        raise buffer.damaged(_("more text follows the JSON array"))


class _Buffer:
    """The unread text of a file."""

    def __init__(self, blocks: Iterator[bytes], codec: str) -> None:
        self.blocks = blocks
        self.decoder = codecs.getincrementaldecoder(codec)("surrogateescape")
        self.text, self.place = "", 0
        self.lines, self.letters = 1, 0  # line number and characters before the text
        self.ended = False
        self.more()
        self.text = self.text.removeprefix("\ufeff")

    def more(self) -> bool:
        """Read at least as much as is unread; return False at the end of the file."""
        if self.ended:
            return False
        self.lines += self.text.count("\n", 0, self.place)
        self.letters += self.place
        pieces = [self.text[self.place :]]
        size, wanted = 0, len(pieces[0])
        while not self.ended and (size <= wanted):
            block = next(self.blocks, None)
            self.ended = block is None
            pieces.append(self.decoder.decode(block or b"", final=self.ended))
            size += len(pieces[-1])
        self.text, self.place = "".join(pieces), 0
        return True

    def letter(self) -> str:
        """Skip blanks; return the next character, or '' at the end."""
        while True:
            self.place = _BLANKS.match(self.text, self.place).end()  # type: ignore[union-attr]
            if self.place < len(self.text):
                return self.text[self.place]
            if not self.more():
                return ""

    def damaged(self, rule: str, place: int | None = None) -> DamagedFile:
        place = self.place if place is None else place
        line = self.lines + self.text.count("\n", 0, place)
        return DamagedFile(
            _("{rule}, at character {letters:,}").format(rule=rule, letters=self.letters + place + 1),
            _("if each line is one object, name the file .jsonl and remove the brackets"),
            line,
        )


def _element(buffer: _Buffer, number: int, name: str, found: Charset) -> RawRow:
    """Return the next element as a row, and move the buffer behind it."""
    buffer.letter()
    while True:
        value, end, refused = _decoded(buffer, number)
        if end < 0 or (end == len(buffer.text) and not buffer.ended):
            buffer.more()
        else:
            break
    text = buffer.text[buffer.place : end]
    buffer.place = end
    try:
        size = len(text.encode())
    except UnicodeEncodeError as error:
        size = len(text.encode("utf-8", "surrogatepass"))
        text = text.encode("utf-8", "backslashreplace").decode()
        rule = _("character {start} is not {found}").format(start=error.start + 1, found=found.name)
        return RawRow(name, number, text, size, rule, "not_utf8" if found.codec == "utf-8" else "bad_bytes")
    if not refused:
        try:
            check_object(value, text)
        except RowRejected as error:
            refused = error
    return (
        RawRow(name, number, text, size, refused.rule, refused.reason) if refused else RawRow(name, number, value, size)
    )


def _decoded(buffer: _Buffer, number: int) -> tuple[Any, int, RowRejected | None]:
    """Return (value, end, reason of refusal); the end is -1 when more text must be read."""
    text, place = buffer.text, buffer.place
    try:
        try:
            return *DECODER.raw_decode(text, place), None
        except RowRejected as error:
            return None, LENIENT.raw_decode(text, place)[1], error
        except RecursionError:
            raise
        except ValueError as error:
            return None, LENIENT.raw_decode(text, place)[1], not_json(error, text, place)
    except RecursionError:
        raise buffer.damaged(_("row {number} is nested too deeply").format(number=number)) from None
    except ValueError as error:
        where = getattr(error, "pos", place)
        cut = str(error).startswith("Unterminated string") or where >= len(text) - 12
        if cut and not buffer.ended and len(text) - place <= CAP:
            return None, -1, None
        if len(text) - place > CAP and cut:
            raise buffer.damaged(
                _("row {number} is larger than {cap:,} bytes").format(number=number, cap=CAP)
            ) from None
        rule = getattr(error, "msg", str(error))
        raise buffer.damaged(
            _("this is not a complete JSON array: {rule} in row {number}").format(rule=rule, number=number),
            where,
        ) from None
