"""Read a file as numbered raw rows: its content decides how it is read, not its name.

A row is a JSON object, a record of a table, a line or a paragraph of text. It is yielded with its value or with its
problem; only a failure that ends the reading is an error of the file. Bytes are never replaced, and the largest row limits
the memory, not the size of the file.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from tongwen.core.errors import DataError, RowRejected
from tongwen.core.i18n import _
from tongwen.data import archives, charset, files, office_files, tables, workbooks
from tongwen.data.charset import Charset
from tongwen.data.files import DamagedFile, Stream, printable
from tongwen.data.formats import LISTS, TURNS
from tongwen.data.json_array import read_array
from tongwen.data.row import CAP, RawRow, parse_json
from tongwen.recipe.data import SourceConfig

# A longer line means that the file has no line ends.
_SKIP = 1 << 28
Line = tuple[int, str, int, str, str]  # number, text, size in UTF-8, and reason and problem when it cannot be used
Notify = Callable[[str], None]


def _ignore(text: str) -> None:
    """Ignore the message."""


def read_rows(
    file: Path, source: SourceConfig | None = None, notify: Notify = _ignore, name: str = ""
) -> Iterator[RawRow]:
    """Yield the rows of one file. notify: called with messages about the detected format; name: what rows and messages call
    the file, by default its path.

    Raises DataError when the file as a whole cannot be read; an unreadable row is yielded with its problem, and so is a
    document that cannot be read, such as an encrypted one: it is one of many.
    """
    source = source or SourceConfig(path=str(file))
    try:
        yield from _rows_of_file(file, source, notify, name or printable(file))
    except DataError as error:
        if files.suffix(file) not in files.DOCUMENT_SUFFIXES:
            raise
        yield RawRow(name or printable(file), 1, "", 0, f"{error.rule}; {error.remedy}".strip("; "), "unreadable_file")


def _rows_of_file(file: Path, source: SourceConfig, notify: Notify, name: str) -> Iterator[RawRow]:
    seen = 0
    with files.open_stream(file) as stream:
        try:
            for raw in _rows(stream, name, source, lambda text: notify(f"{name}: {text}"), notify):
                seen += 1
                yield raw
        except DamagedFile as error:
            raise DataError(
                _("{rule}; {seen} rows before it are readable").format(rule=error.rule, seen=seen),
                place=f"{name}:{error.line}" if error.line else name,
                remedy=error.remedy,
            ) from None
        except DataError as error:
            raise DataError(error.rule, place=error.place or name, remedy=error.remedy) from None
        if not seen:
            raise DataError(
                _("no rows: only whitespace"),
                place=name,
                remedy=_("remove it from the recipe"),
            )


def _rows(stream: Stream, name: str, source: SourceConfig, notify: Notify, notify_of_other: Notify) -> Iterator[RawRow]:
    suffix = files.suffix(stream.file)
    if stream.file.suffix.lower() in files.PACKED_SUFFIXES and not stream.packed:
        notify(_("named {suffix}, but not compressed").format(suffix=stream.file.suffix))
    if not stream.packed and (kind := files.document_kind(stream.file, stream.head)):
        encoding = charset.choose(stream.head, source.encoding, stream.whole).codec if kind == "html" else ""
        pages = office_files.read_pages(stream.file, kind, name, encoding, notify)
        return _joined(pages) if source.records == "file" else pages
    if files.is_zip(stream.head):
        if files.zip_kind(stream.file) == "zip":
            if suffix in files.WORKBOOK_SUFFIXES | files.DOCUMENT_SUFFIXES:
                raise DamagedFile(_("named {suffix}, but it has none of its parts").format(suffix=suffix))
            return archives.read_archive(
                stream.file, name, lambda copy, member: read_rows(copy, source, notify_of_other, member), notify
            )
        if source.records == "file":
            return workbooks.read_sheets(stream.file, name)
        return workbooks.read_workbook(stream.file, name, _names_of_lists(source), notify)
    if files.is_table(stream.head):
        if suffix not in files.TABLE_SUFFIXES:
            notify(_("read as a table (Parquet or Arrow) despite its name"))
        return tables.read_table(stream.file, stream.head, name)
    if suffix in files.TABLE_SUFFIXES:
        raise DataError(
            _("named {suffix}, but it does not begin like a Parquet or Arrow file").format(suffix=suffix),
            remedy=_("fetch the file again"),
        )
    found = charset.choose(stream.head, source.encoding, stream.whole)
    if found.notice:
        notify(found.notice)
    if not found.by_line:
        stream.blocks = _transcoded(stream.blocks, found)
        stream.head = b"".join(_until_damage(_transcoded(iter([stream.head]), found, final=stream.whole)))
        found = Charset("utf-8")
    head = stream.head.decode(found.codec, "ignore").removeprefix("\ufeff")
    return _read_as(_kind(head, suffix, stream.whole, notify), head, stream, found, name, source, notify)


def _read_as(
    kind: str, head: str, stream: Stream, found: Charset, name: str, source: SourceConfig, notify: Notify
) -> Iterator[RawRow]:
    if kind == "array":
        return read_array(stream.blocks, found, name)
    _check_line_ends(head)
    if kind == "csv":
        suffix = files.suffix(stream.file)
        return tables.read_csv(_lines(stream.blocks, found), head, suffix, name, _names_of_lists(source))
    if kind == "lines":
        _check_one_object(head, source)
        return _read_json_lines(_lines(stream.blocks, found), name, source)
    records = "file" if files.suffix(stream.file) in files.MARKDOWN_SUFFIXES and not source.records else ""
    return _read_text(_lines(stream.blocks, found), name, records or _records(head, source, notify))


def _joined(pages: Iterator[RawRow]) -> Iterator[RawRow]:
    """Yield the pages that have text as one row, those that have none as they are."""
    texts = list[RawRow]()
    for page in pages:
        if page.problem:
            yield page
        else:
            texts.append(page)
    if texts:
        text = "\n\n".join(page.value["text"] for page in texts)
        yield replace(texts[0], value={"text": text}, size=len(text.encode("utf-8", "surrogatepass")))


def _names_of_lists(source: SourceConfig) -> set[str]:
    return {source.columns.get(column, column) for column in LISTS}


def _kind(head: str, suffix: str, whole: bool, notify: Notify) -> str:
    """Return `array`, `lines` (of JSON), `csv` or `text`."""
    beginning = head.lstrip()
    if suffix in files.JSON_SUFFIXES:
        return "array" if beginning.startswith("[") and not _is_list_line(beginning) else "lines"
    kind = "array" if re.match(r"\[\s*\{\s*\"", beginning) else "lines" if _is_object(beginning, whole) else ""
    if kind:
        notify(_("read as a JSON array") if kind == "array" else _("read as JSON lines"))
        return kind
    return "csv" if suffix in files.CSV_SUFFIXES else "text"


def _is_object(beginning: str, whole: bool) -> bool:
    """Whether the first line of a text is a JSON object, or looks like one if its end is not visible."""
    if not beginning.startswith("{"):
        return False
    line, end, _unused = beginning.partition("\n")
    if not end and not whole:
        return bool(re.match(r"\{\s*\"[^\"\n]{1,100}\"\s*:", beginning))
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _is_list_line(beginning: str) -> bool:
    """Whether the first line is a complete list and another row follows: JSON lines with a bad first line."""
    line, _unused, rest = beginning.partition("\n")
    try:
        return rest.lstrip()[:1] in ("{", "[") and isinstance(json.loads(line), list)
    except (ValueError, RecursionError):
        return False


def _check_line_ends(head: str) -> None:
    if "\r" in head and "\n" not in head:
        raise DataError(
            _("no line end found: lines end with \\r alone"),
            remedy=_("convert it: tr '\\r' '\\n' < FILE > NEW"),
        )


# -- lines ---------------------------------------------------------------------------------------------------------


class _LongLine(bytes):
    """The beginning of a line that is too long to keep; `size` is its full length."""

    size: int


def _split(blocks: Iterator[bytes]) -> Iterator[bytes]:
    """Yield lines without \\n. A line longer than CAP is yielded as a _LongLine with its beginning."""
    rest = b""
    for block in blocks:
        lines = (rest + block).split(b"\n")
        rest = lines.pop()
        yield from lines
        if len(rest) > CAP:
            long, rest = _skip(rest, blocks)
            yield long
    if rest:  # several lines if a long line ended in the last block
        yield from rest.split(b"\n")


def _skip(begin: bytes, blocks: Iterator[bytes]) -> tuple[_LongLine, bytes]:
    """Return (the long line, the rest of the block). Raises DamagedFile when the line does not end."""
    long, size, rest = _LongLine(begin[:4096]), len(begin), b""
    for block in blocks:
        end = block.find(b"\n")
        size += len(block) if end < 0 else end
        if size > _SKIP:
            raise DamagedFile(_("no line end within {size:,} bytes").format(size=size))
        if end >= 0:
            rest = block[end + 1 :]
            break
    long.size = size
    return long, rest


def _lines(blocks: Iterator[bytes], found: Charset) -> Iterator[Line]:
    """Decode every line separately, so that broken bytes lose only one row."""
    codec, is_utf8 = found.codec, found.codec == "utf-8"
    for number, line in enumerate(_split(blocks), 1):
        if line[-1:] == b"\r":
            line = line[:-1]
        try:
            text = line.decode(codec)
        except UnicodeDecodeError as error:
            yield _undecodable(number, line, error, found)
            continue
        if text[:1] == "\ufeff":
            text = text[1:]
            line = line[3:] if is_utf8 else line
        if len(line) >= 4096 and isinstance(line, _LongLine):
            yield (number, text, line.size, *_too_large(line.size))
        elif not is_utf8 and not line.isascii() and _is_utf8(line):
            yield number, text, len(text.encode("utf-8", "surrogatepass")), "bad_bytes", _mixed(found)
        elif "\0" in text:
            yield number, *_without_nul(text, line, found)
        else:
            yield number, text, len(line) if is_utf8 else len(text.encode("utf-8", "surrogatepass")), "", ""


def _too_large(size: int) -> tuple[str, str]:
    rule = _("this row has {size:,} bytes; the limit is {cap:,}").format(size=size, cap=CAP)
    return "too_large", rule


def _undecodable(number: int, line: bytes, error: UnicodeDecodeError, found: Charset) -> Line:
    if isinstance(line, _LongLine):
        return (number, line[:200].decode(found.codec, "backslashreplace"), line.size, *_too_large(line.size))
    text = line.decode(found.codec, "backslashreplace")
    rule = _("the byte at {start} is not {found}").format(start=error.start, found=found.name)
    likely = charset.recognise(line)
    if found.codec != "utf-8" and _is_utf8(line):
        rule = _mixed(found)
    elif found.codec == "utf-8" and likely.codec != "utf-8":
        rule += _("; it may be {likely}").format(likely=likely.name)
    elif error.reason == "unexpected end of data":
        rule += _("; truncated?")
    return number, text, len(line), "not_utf8" if found.codec == "utf-8" else "bad_bytes", rule


def _mixed(found: Charset) -> str:
    return _("this line is UTF-8 in a {found} file").format(found=found.name)


def _is_utf8(line: bytes) -> bool:
    """Whether a line is Chinese in UTF-8: it has four long characters. No GB18030 text seen so far has that by chance."""
    try:
        return sum(letter > "\u07ff" for letter in line.decode("utf-8")) >= 4
    except UnicodeDecodeError:
        return False


def _without_nul(text: str, line: bytes, found: Charset) -> tuple[str, int, str, str]:
    """Return the problem of a row with NUL bytes, which a power loss can leave in a file."""
    count = text.count("\0")
    rule = _("{count:,} NUL bytes: the file is damaged here").format(count=count)
    return text.replace("\0", "\u2400") if count < 100 else text.strip("\0"), len(line), "nul_character", rule


def _transcoded(blocks: Iterator[bytes], found: Charset, final: bool = True) -> Iterator[bytes]:
    """Convert UTF-16 or UTF-32 to UTF-8. Lone surrogates stay, so that only their row is refused."""
    passes = "surrogatepass" if found.codec.startswith(("utf-16", "utf-32")) else "strict"
    decoder = codecs.getincrementaldecoder(found.codec)(passes)
    try:
        for block in blocks:
            if text := decoder.decode(block):
                yield text.encode("utf-8", "surrogatepass")
        yield decoder.decode(b"", final).encode("utf-8", "surrogatepass")
    except UnicodeDecodeError as error:
        raise DamagedFile(
            _("these bytes are not {found}: {reason}").format(found=found.name, reason=error.reason)
        ) from None


def _until_damage(blocks: Iterator[bytes]) -> Iterator[bytes]:
    """Yield the blocks before an error; reading the rows raises the same error later."""
    try:
        yield from blocks
    except DamagedFile:
        return


# -- text ----------------------------------------------------------------------------------------------------------


SPARSE = 50  # with fewer than one blank line per SPARSE lines, each line is a record
_BLANK_LINE = re.compile(r"\n[ \t\r\u3000]*(?=\n)")


def _records(head: str, source: SourceConfig, notify: Notify) -> str:
    """Return `line`, `paragraph` or `file`: the recipe's setting, or decided by the blank lines in the head."""
    if source.records:
        return source.records
    text = head.strip()
    blank, lines = len(_BLANK_LINE.findall(text)), text.count("\n") + 1
    if blank * SPARSE > lines:
        return "paragraph"
    seen = _("{blank:,} of {lines:,} lines are blank").format(blank=blank, lines=lines) if blank else _("no blank line")
    notify(_("{seen}: each line is a record (records: paragraph or file changes that)").format(seen=seen))
    return "line"


def _read_text(lines: Iterator[Line], name: str, records: str) -> Iterator[RawRow]:
    if records != "line":
        yield from _read_blocks(lines, name, by_file=records == "file")
        return
    for number, text, size, reason, problem in lines:
        if problem:
            yield RawRow(name, number, text, size, problem, reason)
        elif text and not text.isspace():
            yield RawRow(name, number, {"text": text}, size)


def _read_blocks(lines: Iterator[Line], name: str, by_file: bool) -> Iterator[RawRow]:
    """Join lines up to a blank line, or all lines, to one row; its number is its first line."""
    block = _Block(name)
    for line in lines:
        if line[3] or (line[1] and not line[1].isspace()) or (block.start and by_file):
            block.add(line)
        elif block.start:
            yield block.row()
            block = _Block(name)
    if block.start:
        yield block.row()


class _Block:
    """The lines of one record. Text beyond CAP is counted, not kept."""

    def __init__(self, name: str) -> None:
        self.name, self.start, self.size = name, 0, 0
        self.texts: list[str] = []
        self.reason, self.problem = "", ""

    def add(self, line: Line) -> None:
        number, text, size, reason, problem = line
        self.start = self.start or number
        self.size += size + 1
        if self.size <= CAP:
            self.texts.append(text)
        if problem and not self.problem:
            self.reason = reason
            self.problem = (
                _("line {number}: {problem}").format(number=number, problem=problem) if number > self.start else problem
            )

    def row(self) -> RawRow:
        text = "\n".join(self.texts).rstrip("\n")
        if self.size > CAP:
            self.reason, self.problem = _too_large(self.size)
            text = text[:200]
        if self.problem:
            return RawRow(self.name, self.start, text, self.size, self.problem, self.reason)
        return RawRow(self.name, self.start, {"text": text}, len(text.encode("utf-8", "surrogatepass")))


# -- JSON ----------------------------------------------------------------------------------------------------------


def _read_json_lines(lines: Iterator[Line], name: str, source: SourceConfig) -> Iterator[RawRow]:
    rows = _parsed(lines, name)
    first, second = next(rows, None), next(rows, None)
    if first and not second:
        _check_wrapper(first.value, source)
    yield from (row for row in (first, second) if row)
    yield from rows


def _parsed(lines: Iterator[Line], name: str) -> Iterator[RawRow]:
    for number, text, size, reason, problem in lines:
        if problem:
            yield RawRow(name, number, text, size, problem, reason)
        elif text and not text.isspace():
            try:
                value = parse_json(text)
            except RowRejected as error:
                yield RawRow(name, number, text, size, error.rule, error.reason)
            else:
                yield RawRow(name, number, value, size)


# Keys of lists inside a row, and keys that only rows have.
_LISTS = {*TURNS, "tools", "functions", "history", "prompt", "completion", "chosen", "rejected"}
_ROW_KEYS = {*_LISTS, "text", "instruction", "instruct", "question", "query", "input", "output", "answer"}


def _check_wrapper(value: Any, source: SourceConfig) -> None:
    """Raise DataError when the only object of a file wraps the rows."""
    if not isinstance(value, dict):
        return
    known = _ROW_KEYS | set(source.columns.values())
    parts = value.values()
    if parts and all(isinstance(part, list) and len(part) > 1 and not isinstance(part[0], dict) for part in parts):
        raise _wrapped(next(iter(value)), by_columns=True)
    if parts and all(isinstance(part, dict) and "0" in part for part in parts):
        raise _wrapped(next(iter(value)), by_columns=True)
    if known & value.keys():
        return
    for key, part in value.items():
        if isinstance(part, list) and part and isinstance(part[0], dict):
            raise _wrapped(key)


def _wrapped(key: str, by_columns: bool = False) -> DataError:
    if by_columns:
        return DataError(
            _("the file is one object whose keys hold whole columns ({key!r}: […]), not rows").format(key=key),
            remedy="python -c \"import pandas; pandas.read_json('FILE').to_json('NEW.jsonl', orient='records', "
            'lines=True, force_ascii=False)"',
        )
    return DataError(
        _("the file is one object with the rows under the key {key!r}").format(key=key),
        remedy=f"jq -c '.[\"{key}\"][]' FILE > NEW.jsonl",
    )


def _check_one_object(head: str, source: SourceConfig) -> None:
    """Raise DataError when a file of JSON lines begins with an object that spans several lines, or that is too long for a
    row."""
    beginning = head.lstrip()
    line, end, _unused = beginning.partition("\n")
    found = re.match(r"\{\s*\"([^\"]{1,100})\"\s*:\s*\[\s*\{", beginning)
    key = found[1] if found and found[1] not in _LISTS | set(source.columns.values()) else ""
    if not beginning.startswith("{") or (not end and not key):
        return
    try:
        json.loads(line)
        return
    except (ValueError, RecursionError):
        pass
    try:
        value, stop = json.JSONDecoder().raw_decode(beginning)
    except RecursionError:
        return
    except ValueError as error:
        cut = getattr(error, "pos", 0) >= len(beginning) - 12 or "Unterminated" in str(error)
        if key and cut and len(head) >= files.HEAD // 4:
            raise _wrapped(key) from None
        return
    if "\n" in beginning[:stop]:
        _check_wrapper(value, source)
        raise DataError(
            _("one object is spread over several lines"),
            remedy=_("one row per line: jq -c . FILE > NEW.jsonl"),
        )
