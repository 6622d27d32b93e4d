"""Workbooks: cells as they are shown, and workbooks that cannot be read."""

from __future__ import annotations

import datetime
import zipfile
from pathlib import Path
from typing import Any

import pytest

from tongwen.core.errors import DataError
from tongwen.data.reader import read_rows
from tongwen.recipe.data import SourceConfig

openpyxl = pytest.importorskip("openpyxl")


def workbook(file: Path, *sheets: list[list[Any]]) -> Path:
    book = openpyxl.Workbook()
    book.remove(book.active)
    for number, rows in enumerate(sheets, 1):
        sheet = book.create_sheet(f"sheet {number}")
        for row in rows:
            sheet.append(row)
    book.save(file)
    return file


def test_cells_are_read_as_they_are_shown(tmp_path: Path) -> None:
    shown = [3, 3.0, 2.5, True, datetime.datetime(2026, 11, 30), "多行\n文本 <1>", "007"]
    rows = [["问题", "答案"], *(["问", cell] for cell in shown), [None, None], ["没有回答", None]]
    found = list(read_rows(workbook(tmp_path / "a.xlsx", rows)))
    answers = ["3", "3", "2.5", "TRUE", "2026-11-30", "多行\n文本 <1>", "007", ""]
    assert [raw.value["答案"] for raw in found] == answers
    assert [raw.row for raw in found] == [*range(2, 9), 10]


def test_other_sheets_are_named(tmp_path: Path) -> None:
    said: list[str] = []
    file = workbook(tmp_path / "a.xlsx", [["question", "answer"], ["a", "b"]], [["c"]])
    list(read_rows(file, SourceConfig(path=str(file)), said.append))
    told = "only the first sheet, sheet 1, is read; the others are sheet 2; `records: file` reads each as a document"
    assert said == [f"{file}: {told}"]


def test_lists_in_cells_are_json(tmp_path: Path) -> None:
    file = workbook(tmp_path / "a.xlsx", [["messages"], ['[{"role": "user", "content": "a"}]'], ["[{broken"]])
    good, bad = read_rows(file)
    assert good.value == {"messages": [{"role": "user", "content": "a"}]}
    assert bad.reason == "not_json" and "messages begins as a list" in bad.problem


def test_row_wider_than_its_header_is_rejected(tmp_path: Path) -> None:
    (wide,) = read_rows(workbook(tmp_path / "a.xlsx", [["a", "b"], [1, 2, 3]]))
    assert wide.reason == "bad_columns"


@pytest.mark.parametrize("change", ["truncated", "other archive", "broken part", "bomb", "old", "no header"])
def test_what_is_no_workbook_is_refused_by_name(tmp_path: Path, change: str) -> None:
    file = workbook(tmp_path / "a.xlsx", [["a", "a"] if change == "no header" else ["a", "b"], [1, 2]])
    if change == "truncated":
        file.write_bytes(file.read_bytes()[:-200])
    elif change == "old":
        file.write_bytes(b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(600))
    elif change != "no header":
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
            if change == "bomb":
                archive.writestr("xl/workbook.xml", bytes(1 << 29))
            else:
                archive.writestr("other/part.xml" if change == "other archive" else "xl/workbook.xml", "<broken")
    with pytest.raises(DataError) as caught:
        list(read_rows(file))
    assert caught.value.place.startswith(str(file))
