"""Each part of a document is in its text, or is named; what cannot be read costs its page or its file, not the others."""

from __future__ import annotations

import gzip
import json
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest

from tests.data.office_documents import PICTURE, line, paragraph, table, write_docx, write_epub, write_pdf, write_zip
from tongwen.data.reader import read_rows
from tongwen.data.row import RawRow
from tongwen.recipe.data import SourceConfig

pytest.importorskip("markitdown")
TEXT = "月亮自己不会发光，它反射太阳的光。"


def read(file: Path, **settings: Any) -> tuple[list[RawRow], list[str]]:
    notices: list[str] = []
    return list(read_rows(file, SourceConfig(path=str(file), **settings), notices.append)), notices


def texts(file: Path, **settings: Any) -> list[str]:
    rows, _notices = read(file, **settings)
    assert not any(row.problem for row in rows), rows
    return [row.value["text"] for row in rows]


def test_docx_keeps_headings_tables_and_notes_and_names_the_rest(tmp_path: Path) -> None:
    note = '<w:p><w:r><w:t>正文</w:t></w:r><w:r><w:footnoteReference w:id="1"/></w:r></w:p>'
    body = paragraph("标题一", "Heading1") + paragraph(TEXT) + table([["城市", "人口"], ["郑州", "1300万"]]) + note
    rows, notices = read(write_docx(tmp_path / "a.docx", body, "脚注里的话", "页眉里的话"))
    (text,) = (row.value["text"] for row in rows)
    assert "# 标题一" in text and TEXT in text and "脚注里的话" in text
    assert "| 城市 | 人口 |" in text and "| 郑州 | 1300万 |" in text
    assert "页眉里的话" not in text
    assert any("word/header1.xml" in one and "页眉里的话" in one for one in notices)


def test_pptx_has_a_row_for_each_slide_with_its_notes(tmp_path: Path) -> None:
    from pptx import Presentation
    from pptx.util import Inches

    deck = Presentation()
    for number in (1, 2):
        slide = deck.slides.add_slide(deck.slide_layouts[1])
        slide.shapes.title.text = f"第{number}页"
        slide.placeholders[1].text = f"要点{number}"
        grid = slide.shapes.add_table(1, 2, Inches(1), Inches(1), Inches(4), Inches(1)).table
        grid.cell(0, 0).text, grid.cell(0, 1).text = f"左{number}", f"右{number}"
        slide.notes_slide.notes_text_frame.text = f"备注{number}"
    deck.save(str(tmp_path / "a.pptx"))
    rows, notices = read(tmp_path / "a.pptx")
    assert [row.row for row in rows] == [1, 2] and not notices
    for number, row in enumerate(rows, 1):
        assert all(f"{part}{number}" in row.value["text"] for part in ("要点", "左", "右", "备注")), row


def test_epub_and_html(tmp_path: Path) -> None:
    (text,) = texts(write_epub(tmp_path / "a.epub", [f"<h1>第一章</h1><p>{TEXT}</p>", "<p>第二章的话</p>"]))
    assert text.index("# 第一章") < text.index(TEXT) < text.index("第二章的话") and "书名" in text
    page = f'<!doctype html><html><head><meta charset="gbk"><title>题</title></head><body><ul><li>{TEXT}</li></ul><script>x()</script></body></html>'
    (tmp_path / "a.html").write_bytes(page.encode("gbk"))
    (text,) = texts(tmp_path / "a.html")
    assert TEXT in text and "x()" not in text


def test_pdf_has_a_row_for_each_page_and_reads_columns_and_vertical_lines(tmp_path: Path) -> None:
    columns = "".join(
        line(f"左栏第{n}行的文字", 50, 700 - 16 * n) + line(f"右栏第{n}行的文字", 330, 700 - 16 * n) for n in range(8)
    )
    vertical = line("从上到下", 300, 700, "F2") + line("从右到左", 260, 700, "F2")
    file = write_pdf(tmp_path / "a.pdf", [line(TEXT, 50, 700), columns, vertical, line("⽂字⻓", 50, 700)])
    rows, _notices = read(file)
    assert [row.row for row in rows] == [1, 2, 3, 4]
    found = ["".join(row.value["text"].split()) for row in rows]
    assert found[0] == TEXT
    assert found[1].index("左栏第7行的文字") < found[1].index("右栏第0行的文字"), "one column after the other"
    assert "从上到下" in found[2] and "从右到左" in found[2]
    (whole,) = texts(file, records="file")
    assert TEXT in whole and "左栏第7行的文字" in whole


def test_pdf_reading_order(tmp_path: Path) -> None:
    """A title over columns of unequal length, on one grid of lines; a table; a page number."""
    left, right = (
        ["".join(chr(0x4E00 + 40 * at + 900 * side + k) for k in range(12)) for at in range(9)] for side in (0, 1)
    )
    grid = "".join(line(text, 50, 700 - 16 * at) for at, text in enumerate(left))
    grid += "".join(line(text, 330, 700 - 16 * at) for at, text in enumerate(right[:5]))
    cells = "".join(
        line(f"{name}{at}", 50 + 150 * column, 400 - 16 * at) for at in range(4) for column, name in enumerate("甲乙丙")
    )
    page = line("标题横跨两栏，比每一栏都宽，也就没有空隙可以切开", 150, 760) + grid + cells + line("7", 290, 40)
    (text,) = texts(write_pdf(tmp_path / "a.pdf", [page]))
    wanted = ["标题横跨", *left, *right[:5], *(f"{name}{at}" for at in range(4) for name in "甲乙丙"), "7"]
    places = [text.index(one) if one != "7" else text.rindex(one) for one in wanted]
    assert places == sorted(places), text
    assert "甲0  乙0  丙0\n甲1  乙1  丙1" in text


def test_epub_names_lost_chapters_and_is_not_read_encrypted(tmp_path: Path) -> None:
    file = write_epub(tmp_path / "a.epub", ["<p>一章</p>", "<p>二章</p>"])
    with zipfile.ZipFile(file) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    write_zip(file, {name: content for name, content in parts.items() if name != "c1.xhtml"})
    rows, notices = read(file)
    assert "一章" in rows[0].value["text"] and any("c1.xhtml" in one for one in notices)
    write_zip(file, {**parts, "META-INF/encryption.xml": b"<x/>"})
    assert [row.reason for row in read(file)[0]] == ["encrypted"]


def test_a_scan_with_its_number_is_a_scan(tmp_path: Path) -> None:
    whole = "q 595 0 0 842 0 0 cm /I1 Do Q\n"
    rows, _notices = read(write_pdf(tmp_path / "a.pdf", [whole + line("3", 290, 40), PICTURE + line("图一", 50, 200)]))
    assert [row.reason for row in rows] == ["scanned_page", ""]


def test_pages_without_text_cost_themselves(tmp_path: Path) -> None:
    rows, _notices = read(write_pdf(tmp_path / "a.pdf", [line(TEXT, 50, 700), PICTURE, "", line("末页", 50, 700)]))
    assert [(row.row, row.reason) for row in rows] == [(1, ""), (2, "scanned_page"), (4, "")]
    assert "page 2" in rows[1].problem and "OCR" in rows[1].problem
    rows, _notices = read(write_pdf(tmp_path / "b.pdf", [line(TEXT, 50, 700)], cids=True))
    assert [row.reason for row in rows] == ["unknown_glyphs"]
    rows, _notices = read(write_pdf(tmp_path / "c.pdf", [line(TEXT, 50, 700)], password="secret"))
    assert [row.reason for row in rows] == ["encrypted"] and "password" in rows[0].problem


def test_a_page_that_asks_for_hours_costs_itself(tmp_path: Path) -> None:
    began = time.process_time()
    pages = [line("一", 50, 700) * 40_000, "0 0 m 1 1 l S\n" * 400_000, line(TEXT, 50, 700)]
    rows, _notices = read(write_pdf(tmp_path / "a.pdf", pages))
    assert [row.reason for row in rows] == ["too_large", "too_large", ""]
    assert time.process_time() - began < 30


def test_sheets_as_documents(tmp_path: Path) -> None:
    openpyxl = pytest.importorskip("openpyxl")
    book = openpyxl.Workbook()
    book.active.title = "名单"
    book.active.append(["城市", "人口"])
    book.active.append(["郑州", 1300])
    book.create_sheet("空")
    book.create_sheet("备注").append(["甲|乙"])
    book.save(tmp_path / "a.xlsx")
    rows, _notices = read(tmp_path / "a.xlsx", records="file")
    assert [(row.row, row.reason) for row in rows] == [(1, ""), (2, "no_text"), (3, "")]
    assert rows[0].value["text"] == "## 名单\n\n| 城市 | 人口 |\n| --- | --- |\n| 郑州 | 1300 |"
    assert "甲\\|乙" in rows[2].value["text"]


def test_compressed_documents_are_refused_by_name(tmp_path: Path) -> None:
    made = write_pdf(tmp_path / "a.pdf", [line(TEXT, 50, 700)]).read_bytes()
    (tmp_path / "a.pdf.gz").write_bytes(gzip.compress(made))
    rows, _notices = read(tmp_path / "a.pdf.gz")
    assert [row.reason for row in rows] == ["unreadable_file"] and "unpack it" in rows[0].problem


@pytest.mark.parametrize("name", ["a.pdf", "a.docx", "a.pptx", "a.epub"])
def test_damaged_files_are_rows_with_their_reason(name: str, tmp_path: Path) -> None:
    begin = b"%PDF-1.4\n" if name == "a.pdf" else b"\xd0\xcf\x11\xe0"  # an encrypted Office file is no ZIP
    (tmp_path / name).write_bytes(begin + b"\x01" * 500)
    rows, _notices = read(tmp_path / name)
    assert len(rows) == 1 and rows[0].problem and rows[0].reason in ("damaged_file", "unreadable_file", "no_text")
    write_zip(tmp_path / name, {"word/document.xml": "<", "ppt/presentation.xml": "<", "META-INF/container.xml": "<"})
    assert [bool(row.problem) for row in read(tmp_path / name)[0]] == [True]


def test_markdown_is_one_document(tmp_path: Path) -> None:
    text = "---\ntitle: 题\n---\n\n# 一\n\n```python\nx = 1\n\n\ny = 2\n```\n\n末段"
    (tmp_path / "a.md").write_text(text, encoding="utf-8")
    assert texts(tmp_path / "a.md") == [text]
    assert len(texts(tmp_path / "a.md", records="paragraph")) > 3


def test_a_run_counts_pages_by_file_and_reason(chat_model: Path, tmp_path: Path, tongwen: Any) -> None:
    folder = tmp_path / "papers"
    folder.mkdir()
    for number in range(6):  # of different characters: no page repeats another
        pages = ["".join(chr(0x4E00 + 97 * number + 31 * page + 600 * at) for at in range(30)) for page in (0, 1)]
        write_pdf(folder / f"{number}.pdf", [line(text, 50, 700) for text in pages])
    write_pdf(folder / "scan.pdf", [PICTURE])
    (folder / "locked.docx").write_bytes(b"\xd0\xcf\x11\xe0" + b"\0" * 500)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"name: d\nbase: {chat_model}\nout: {tmp_path / 'out'}\nprepare: {{documents: [{folder}], held_out: 2, dedup: {{documents: 'off'}}}}\n"
        "pretrain: {max_length: 64, batch_size: 4, stop_after: 1 steps, precision: fp32, samples: 0, learning_rate: 1e-3}\n",
        encoding="utf-8",
    )
    code, _out, err = tongwen("run", recipe, "--until", "prepare")
    assert code == 0, err
    rejected = [
        json.loads(row) for row in (tmp_path / "out/prepare/rejected.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    assert {(Path(row["file"]).name, row["row"], row["reason"]) for row in rejected} == {
        ("scan.pdf", 1, "scanned_page"),
        ("locked.docx", 1, "unreadable_file"),
    }
    kept = [
        json.loads(row) for row in (tmp_path / "out/prepare/documents.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    assert {(Path(row["origin"]["file"]).name, row["origin"]["row"]) for row in kept} <= {
        (f"{n}.pdf", page) for n in range(6) for page in (1, 2)
    }
    assert len(kept) == 10


def test_rows_limits_a_source_over_its_files(tmp_path: Path) -> None:
    from tongwen.data.input_parts import list_parts, raw_rows
    from tongwen.recipe.data import Prepare

    for name in "abc":
        (tmp_path / f"{name}.txt").write_text("\n\n".join(f"{name}{number}" for number in range(4)), encoding="utf-8")
    for wanted, found in ((3, [3]), (4, [4]), (6, [4, 2]), (99, [4, 4, 4])):
        section = Prepare.model_validate({"documents": [{"path": str(tmp_path), "rows": wanted}]})
        parts = list_parts(section, lambda path, _notify: path, lambda _text: None)
        assert [sum(1 for _row in raw_rows(part, lambda _text: None)) for part in parts] == found
    assert "rows" not in SourceConfig(path="a").model_dump(), "results of version 0.1 have the same settings"


def test_only_scans_end_with_3(chat_model: Path, tmp_path: Path, tongwen: Any) -> None:
    write_pdf(tmp_path / "scan.pdf", [PICTURE])
    recipe = tmp_path / "recipe.yaml"
    settings = "{max_length: 64, batch_size: 4, stop_after: 1 steps, learning_rate: 1e-3}"
    where = f"name: d\nbase: {chat_model}\nout: {tmp_path / 'out'}\n"
    recipe.write_text(f"{where}prepare: {{documents: {tmp_path / 'scan.pdf'}}}\npretrain: {settings}\n")
    code, out, err = tongwen("check", recipe)
    assert code == 3 and "OCR" in err, out + err


def test_without_the_extra_the_error_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    from tongwen.core.errors import MissingPackage

    file = write_pdf(tmp_path / "a.pdf", [line(TEXT, 50, 700)])
    monkeypatch.setitem(sys.modules, "tongwen.data.pdf_pages", None)
    with pytest.raises(MissingPackage, match="tongwen\\[documents\\]"):
        read(file)
