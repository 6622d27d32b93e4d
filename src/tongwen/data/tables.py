"""Read the rows of tables: CSV by its header, Parquet and Arrow by their schema, batch by batch."""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tongwen.core.errors import DataError, MissingPackage, RowRejected
from tongwen.core.i18n import _
from tongwen.data.files import DamagedFile, check_unpacked_size
from tongwen.data.row import CAP, DECODER, RawRow, is_deep, too_deep

_BATCH = 256  # rows

# -- CSV -----------------------------------------------------------------------------------------------------------

Line = tuple[int, str, int, str, str]  # as in `reader`


def read_csv(lines: Iterator[Line], head: str, suffix: str, name: str, lists: Collection[str] = ()) -> Iterator[RawRow]:
    """Yield records by the names of the header; a record's number is its first line.

    lists: names of columns that hold lists, which a table can only write as JSON.

    A record with another number of columns is a bad row. An unterminated or misplaced quote raises DamagedFile, since the
    beginning of the next record is unknown.
    """
    csv.field_size_limit(CAP)
    taken: list[Line] = []
    reader = csv.reader(_fed(lines, taken), delimiter=_delimiter(head, suffix), strict=True)
    columns: list[str] = []
    while True:
        taken.clear()
        try:
            record = next(reader, None)
        except csv.Error as error:
            raise DamagedFile(
                _("this is not CSV: {error}").format(error=error),
                _('double each quote inside a field: "he said ""yes"""'),
                line=taken[0][0] if taken else 0,
            ) from None
        if record is None:
            return
        if not "".join(record).strip() and len(record) < 2:
            continue
        if not columns:
            columns = _header(record, taken[0])
            lists = columns_of_lists(columns, lists)
            continue
        start, size = taken[0][0], sum(line[2] for line in taken) + len(taken) - 1
        problem = next(((line[4], line[3]) for line in taken if line[3]), None)
        if problem:
            yield RawRow(name, start, "\n".join(line[1] for line in taken), size, *problem)
        elif len(record) != len(columns):
            yield row_of_other_width(name, start, record, size, columns)
        else:
            yield row_of_texts(name, start, dict(zip(columns, record, strict=True)), size, lists)


def row_of_texts(name: str, number: int, values: dict[str, Any], size: int, lists: Collection[str]) -> RawRow:
    """Return a row of texts with its lists read from their JSON; a text that does not begin as a list stays.

    lists: columns of this table.
    """
    for column in lists:
        text = values[column]
        if not text.lstrip().startswith("["):
            continue
        try:
            values[column] = DECODER.decode(text)
        except (ValueError, RecursionError, RowRejected) as error:
            rule = _("{column} begins as a list, but is not JSON: {error}").format(column=column, error=error)
            return RawRow(name, number, values, size, rule, "not_json")
        if is_deep(values):
            refused = too_deep()
            return RawRow(name, number, values, size, refused.rule, refused.reason)
    return RawRow(name, number, values, size)


def columns_of_lists(columns: Sequence[str], lists: Collection[str]) -> list[str]:
    """Return those columns of a table that hold lists."""
    return [column for column in columns if column in lists]


def row_of_other_width(name: str, number: int, texts: list[str], size: int, columns: Sequence[str]) -> RawRow:
    rule = _("{record_count} columns, the header has {columns_count}").format(
        record_count=len(texts), columns_count=len(columns)
    )
    return RawRow(name, number, texts, size, rule, "bad_columns")


def _fed(lines: Iterator[Line], taken: list[Line]) -> Iterator[str]:
    """Yield the texts for the parser; append the lines that it has read to `taken`."""
    for line in lines:
        taken.append(line)
        if line[3] == "too_large":
            raise DamagedFile(line[4], line=line[0])
        yield line[1] + "\n"


def _delimiter(head: str, suffix: str) -> str:
    first = next((line for line in head.split("\n") if line.strip()), "")
    first = re.sub('"[^"]*"', "", first)
    usual = "\t" if suffix == ".tsv" else ","
    return max((usual, ",", "\t", ";"), key=first.count)


def _header(record: list[str], line: Line) -> list[str]:
    if line[3]:
        raise DamagedFile(line[4], line=line[0])
    return read_header(record, line[0])


def read_header(record: Sequence[str], line: int) -> list[str]:
    """Return the names of the columns. Raises DamagedFile when they do not name each once."""
    columns = [column.strip() for column in record]
    if "" in columns or len(set(columns)) != len(columns):
        shown = ", ".join(map(repr, columns))
        raise DamagedFile(
            _("the first line must name every column once: {shown}").format(shown=shown),
            line=line,
        )
    return columns


# -- Parquet and Arrow ---------------------------------------------------------------------------------------------


def read_table(file: Path, head: bytes, name: str) -> Iterator[RawRow]:
    """Yield the rows of a Parquet file, an Arrow file (Feather) or an Arrow stream."""
    try:
        import pyarrow as pa
    except ImportError:
        raise MissingPackage("pyarrow", _("Parquet and Arrow files"), "parquet") from None

    number = 0
    with file.open("rb") as raw, _damage(pa):
        for batch in _parquet(raw, file) if head.startswith(b"PAR1") else _arrow(raw, head):
            for value in _values(batch):
                number += 1
                yield _row(name, number, value)


@contextmanager
def _damage(pa: Any) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowException, OSError, ValueError) as error:
        reason = str(error).split("\n")[0][:200]
        raise DamagedFile(
            _("this table is damaged: {reason}").format(reason=reason), _("fetch the file again")
        ) from None


def _parquet(raw: Any, file: Path) -> Iterator[Any]:
    from pyarrow import parquet

    table = parquet.ParquetFile(raw, page_checksum_verification=True)
    _check_types(table.schema_arrow)
    groups = (table.metadata.row_group(index) for index in range(table.metadata.num_row_groups))
    check_unpacked_size(file, sum(group.total_byte_size for group in groups))
    yield from table.iter_batches(batch_size=_BATCH, use_threads=False)


def _arrow(raw: Any, head: bytes) -> Iterator[Any]:
    from pyarrow import ipc

    is_file = head.startswith(b"ARROW1")
    table = ipc.open_file(raw) if is_file else ipc.open_stream(raw)
    _check_types(table.schema)
    batches: Iterable[Any] = (table.get_batch(index) for index in range(table.num_record_batches)) if is_file else table
    for batch in batches:
        batch.validate(full=True)  # unchecked offsets of the file could point to any memory
        for start in range(0, batch.num_rows, _BATCH):
            yield batch.slice(start, _BATCH)


def _check_types(schema: Any) -> None:
    """Raise DataError for extension types, which are never constructed, and for duplicate column names."""
    import pyarrow as pa

    def inner(type_: Any) -> Iterator[Any]:
        yield type_
        for index in range(type_.num_fields):
            yield from inner(type_.field(index).type)

    for field in schema:
        bad = any(isinstance(type_, pa.BaseExtensionType) for type_ in inner(field.type))
        if bad or b"ARROW:extension:name" in (field.metadata or {}):
            raise DataError(
                _("the column {field!r} has an extension type ({type}), which is not supported").format(
                    field=field.name, type=field.type
                )
            )
    names = list(schema.names)
    if len(set(names)) != len(names):
        raise DataError(_("columns with the same name: {names}").format(names=_(", ").join(names)))


def _values(batch: Any) -> Iterator[Any]:
    """Yield rows as dictionaries; a row whose text is not UTF-8 as the error."""
    try:
        yield from batch.to_pylist()
    except UnicodeDecodeError:
        for index in range(batch.num_rows):
            try:
                yield batch.slice(index, 1).to_pylist()[0]
            except UnicodeDecodeError as error:
                yield error


def _row(name: str, number: int, value: Any) -> RawRow:
    if isinstance(value, UnicodeDecodeError):
        rule = _("the byte at {start} is not UTF-8").format(start=value.start)
        return RawRow(name, number, repr(value.object[:200]), len(value.object), rule, "not_utf8")
    value = {str(key): _as_json(part) for key, part in value.items()}
    size = len(json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass"))
    if size > CAP:
        rule = _("this row has {size:,} bytes; the limit is {cap:,}").format(size=size, cap=CAP)
        return RawRow(name, number, "", size, rule, "too_large")
    if is_deep(value):
        refused = too_deep()
        return RawRow(name, number, value, size, refused.rule, refused.reason)
    return RawRow(name, number, value, size)


def _as_json(value: Any) -> Any:
    """Convert a value to JSON types. NaN becomes null, as in pandas' files; a date becomes an object, so that it is never
    read as text. Objects inside a row lose their nulls: these tables give all objects of a column the same keys, and fill
    what an object did not have with null."""
    if value is None or isinstance(value, (str, int)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        parts = ((str(key), _as_json(part)) for key, part in value.items() if part is not None)
        return {key: part for key, part in parts if part is not None}
    if isinstance(value, (list, tuple)):
        return [_as_json(part) for part in value]
    return {type(value).__name__: str(value)[:1000]}
