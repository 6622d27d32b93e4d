"""Read the first sheet of an Excel workbook as a table: its first row names the columns."""

from __future__ import annotations

import datetime
import json
import warnings
import zipfile
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tongwen.core.errors import MissingPackage, first_line
from tongwen.core.i18n import _
from tongwen.data.files import DamagedFile, check_unpacked_size
from tongwen.data.row import CAP, RawRow
from tongwen.data.tables import columns_of_lists, read_header, row_of_other_width, row_of_texts


def read_workbook(file: Path, name: str, lists: Collection[str], notify: Callable[[str], None]) -> Iterator[RawRow]:
    """Yield the rows of the first sheet, by its header; a row's number is that of the sheet. Empty rows are passed over.

    Values are what the cells show as text: a formula gives the value that was stored with it. lists: columns that hold lists,
    as JSON. Raises DamagedFile.
    """
    with _sheets(file) as sheets:
        sheet, *others = sheets
        if others:
            notify(
                _(
                    "only the first sheet, {sheet}, is read; the others are {others}; `records: file` reads each as a document"
                ).format(sheet=sheet.title, others=_(", ").join(one.title for one in others))
            )
        yield from _rows(enumerate(sheet.iter_rows(values_only=True), 1), name, lists)


def read_sheets(file: Path, name: str) -> Iterator[RawRow]:
    """Yield each sheet as a document, a table in Markdown under its name; a row's number is that of the sheet. Raises
    DamagedFile."""
    with _sheets(file) as sheets:
        for number, sheet in enumerate(sheets, 1):
            rows = [
                [_text(cell).replace("|", "\\|").replace("\n", " ") for cell in row]
                for row in sheet.iter_rows(values_only=True)
            ]
            rows = [row for row in rows if any(row)]
            if not rows:
                yield RawRow(name, number, "", 0, _("the sheet {sheet} is empty").format(sheet=sheet.title), "no_text")
                continue
            width = max(max(place for place, cell in enumerate(row, 1) if cell) for row in rows)
            lines = ["| " + " | ".join(row[:width] + [""] * (width - len(row))) + " |" for row in rows]
            lines.insert(1, "|" + " --- |" * width)
            text = f"## {sheet.title}\n\n" + "\n".join(lines)
            yield RawRow(name, number, {"text": text}, len(text.encode("utf-8", "surrogatepass")))


@contextmanager
def _sheets(file: Path) -> Iterator[list[Any]]:
    try:
        from openpyxl import load_workbook
    except ImportError:
        raise MissingPackage("openpyxl", _("Excel workbooks"), "xlsx") from None
    with zipfile.ZipFile(file) as archive:
        check_unpacked_size(file, sum(part.file_size for part in archive.infolist()))
    try:
        with warnings.catch_warnings(), file.open("rb") as raw:  # by its name it would refuse other suffixes
            warnings.simplefilter("ignore")  # of styles that it does not know
            book = load_workbook(raw, read_only=True, data_only=True, keep_links=False)
            for sheet in book.worksheets:
                sheet.reset_dimensions()  # a file may claim any
            yield book.worksheets
            book.close()
    except (DamagedFile, MissingPackage):
        raise
    except Exception as error:  # the library raises whatever a damaged part makes it meet
        raise DamagedFile(
            _("this workbook is damaged: {reason}").format(reason=first_line(error)[:200]),
            _("save it again as .xlsx, or as CSV in UTF-8"),
        ) from None


def _rows(lines: Iterator[tuple[int, tuple[Any, ...]]], name: str, lists: Collection[str]) -> Iterator[RawRow]:
    columns: list[str] = []
    for number, cells in lines:
        texts = [_text(cell) for cell in cells]
        while texts and not texts[-1]:
            texts.pop()
        if not texts:
            continue
        if not columns:
            columns = read_header(texts, number)
            lists = columns_of_lists(columns, lists)
            continue
        size = len(json.dumps(texts, ensure_ascii=False).encode("utf-8", "surrogatepass"))
        if len(texts) > len(columns):
            yield row_of_other_width(name, number, texts, size, columns)
        elif size > CAP:
            rule = _("this row has {size:,} bytes; the limit is {cap:,}").format(size=size, cap=CAP)
            yield RawRow(name, number, "", size, rule, "too_large")
        else:
            texts += [""] * (len(columns) - len(texts))
            yield row_of_texts(name, number, dict(zip(columns, texts, strict=True)), size, lists)


def _text(cell: Any) -> str:
    """Return a cell's value as a reader sees it: 3, not 3.0; a day without its midnight."""
    if cell is None:
        return ""
    if isinstance(cell, bool):
        return str(cell).upper()
    if isinstance(cell, float) and cell.is_integer() and abs(cell) < 1e15:
        return str(int(cell))
    if isinstance(cell, datetime.datetime) and cell.time() == datetime.time():
        return cell.date().isoformat()
    return str(cell)
