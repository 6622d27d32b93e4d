"""The same rows in files of every format."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tongwen.core.errors import RowRejected
from tongwen.core.records import Document, Origin
from tongwen.data import formats
from tongwen.data.reader import read_rows
from tongwen.data.row import RawRow
from tongwen.recipe.data import SourceConfig

TURNS = [("user", "你好，今天天气怎么样？"), ("assistant", "今天天气很好，我们可以去公园。")]
SIMPLIFIED = [
    {"instruction": "请介绍一下你自己，", "input": "", "output": '我是一个"中文"助手，\n可以回答问题。'},
    {"instruction": "什么是机器学习？", "input": "用简单的话说", "output": "让计算机从数据里学到规律。"},
    {"instruction": "Translate: 我们，去公园", "input": "", "output": "Let's go to the park\t!"},
]


def take(
    file: Path, tell: Callable[[str], None] = lambda text: None, documents: bool = False, **settings: Any
) -> tuple[list[Any], list[tuple[RawRow, RowRejected]]]:
    """Read a file as the data preparation does: its records, and its bad rows with the reason."""
    source = SourceConfig(path=str(file), **settings)
    good: list[Any] = []
    bad: list[tuple[RawRow, RowRejected]] = []
    for raw in read_rows(file, source, tell):
        origin = Origin(raw.file, raw.row)
        try:
            if raw.problem:
                raise RowRejected(raw.reason, raw.problem)
            if documents:
                good.append(formats.read_document(raw.value, source, origin))
            else:
                format_ = source.format or formats.recognise_row(raw, source)
                good.append(formats.read_dialogue(raw.value, format_, source, {}, origin))
        except RowRejected as refused:
            bad.append((raw, refused))
    return good, bad


def contents_of(records: list[Any]) -> list[Any]:
    """What records say, without where they are from."""
    return [
        record.text if isinstance(record, Document) else [(turn.role, turn.content) for turn in record.messages]
        for record in records
    ]


def as_lines(rows: list[Any]) -> bytes:
    return b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows)


def as_csv(rows: list[dict[str, Any]], delimiter: str = ",") -> bytes:
    out = io.StringIO(newline="")
    writer = csv.DictWriter(out, list(rows[0]), delimiter=delimiter, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue().encode()


def as_table(kind: str) -> Callable[[list[dict[str, Any]]], bytes]:
    def write(rows: list[dict[str, Any]]) -> bytes:
        pa = pytest.importorskip("pyarrow")
        from pyarrow import feather, ipc, parquet

        table, out = pa.Table.from_pylist(rows), io.BytesIO()
        if kind == "parquet":
            parquet.write_table(table, out, row_group_size=2)
        elif kind == "feather":
            feather.write_feather(table, out, compression="zstd")
        else:
            with (ipc.new_file if kind == "arrow" else ipc.new_stream)(out, table.schema) as writer:
                writer.write_table(table)
        return out.getvalue()

    return write


def as_workbook(rows: list[dict[str, Any]]) -> bytes:
    openpyxl = pytest.importorskip("openpyxl")
    book, out = openpyxl.Workbook(), io.BytesIO()
    sheet = book.active
    sheet.append(list(rows[0]))
    for row in rows:
        sheet.append(list(row.values()))
    book.create_sheet("notes").append(["not read"])
    book.save(out)
    return out.getvalue()


CONTAINERS: dict[str, Callable[[list[dict[str, Any]]], bytes]] = {
    "a.jsonl": as_lines,
    "crlf.jsonl": lambda rows: as_lines(rows).replace(b"\n", b"\r\n"),
    "no_end.ndjson": lambda rows: as_lines(rows).rstrip(),
    "blank.jsonl": lambda rows: b"\n \n" + as_lines(rows).replace(b"\n", b"\n\n\t\n"),
    "joined.jsonl": lambda rows: b"\n".join(b"\xef\xbb\xbf" + line for line in as_lines(rows).split(b"\n")[:-1]),
    "escaped.jsonl": lambda rows: b"".join(json.dumps(row).encode() + b"\n" for row in rows),
    "a.json": lambda rows: json.dumps(rows, ensure_ascii=False).encode(),
    "indented.json": lambda rows: json.dumps(rows, ensure_ascii=False, indent=2).encode(),
    "lines.json": as_lines,
    "lines.txt": as_lines,
    "array.txt": lambda rows: json.dumps(rows).encode(),
    "array.jsonl": lambda rows: json.dumps(rows).encode(),
    "unnamed": as_lines,
    "a.csv": as_csv,
    "semicolon.csv": lambda rows: as_csv(rows, ";"),
    "a.tsv": lambda rows: as_csv(rows, "\t"),
    "a.parquet": as_table("parquet"),
    "parquet.jsonl": as_table("parquet"),
    "a.arrow": as_table("arrow"),
    "stream.arrow": as_table("stream"),
    "a.feather": as_table("feather"),
    "a.xlsx": as_workbook,
    "workbook.csv": as_workbook,
}


def write(folder: Path, container: str, rows: list[dict[str, Any]], change: Callable[[bytes], bytes] = bytes) -> Path:
    file = folder / container
    file.write_bytes(change(CONTAINERS[container](rows)))
    return file
