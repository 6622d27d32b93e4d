"""A ZIP archive is read as its files would be, under their names; what cannot be read costs one member."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import pytest

from tests.data.office_documents import line, write_pdf, write_zip
from tongwen.core.errors import DataError
from tongwen.data.archives import member_name
from tongwen.data.reader import read_rows
from tongwen.data.row import RawRow

ROW = json.dumps({"instruction": "问", "output": "答"}, ensure_ascii=False)


def read(file: Path) -> tuple[list[RawRow], list[str]]:
    notices: list[str] = []
    return list(read_rows(file, notify=notices.append)), notices


def test_members_are_read_in_order_with_their_names(tmp_path: Path) -> None:
    file = write_zip(
        tmp_path / "a.zip",
        {"b/问答.jsonl": f"{ROW}\n{ROW}\n", "a.csv": "question,answer\n一,二\n", "图.png": b"x", ".hidden.txt": "x", "__MACOSX/a.txt": "x", "c.zip": b"PK"},
    )  # fmt: skip
    rows, notices = read(file)
    assert [(row.file, row.row, row.reason) for row in rows] == [
        (f"{file}/a.csv", 2, ""), (f"{file}/b/问答.jsonl", 1, ""), (f"{file}/b/问答.jsonl", 2, ""), (f"{file}/c.zip", 1, "nested_archive"),
    ]  # fmt: skip
    assert any("图.png" in one for one in notices)


def test_a_member_is_named_by_its_place_in_the_archive(tmp_path: Path) -> None:
    file = write_zip(tmp_path / "a.zip", {"../../up.txt": "一\n二\n"})
    rows, notices = read(file)
    assert {row.file for row in rows} == {f"{file}/../../up.txt"} and len(rows) == 2
    assert notices and all(one.startswith(f"{file}/../../up.txt: ") for one in notices)
    with pytest.raises(DataError, match="no member of this archive is a data file"):
        read(write_zip(tmp_path / "b.zip", {"a.png": "x"}))
    (tmp_path / "c.zip").write_bytes(b"PK\x05\x06" + bytes(18))
    with pytest.raises(DataError, match="this archive is empty"):
        read(tmp_path / "c.zip")


def test_names_in_gbk(tmp_path: Path) -> None:
    info = zipfile.ZipInfo("x.txt")
    info.filename = "资料.txt".encode("gb18030").decode("cp437")
    info.flag_bits = 0
    assert member_name(info) == "资料.txt"
    info.filename, info.flag_bits = "资料.txt", 0x800
    assert member_name(info) == "资料.txt"


def test_documents_inside(tmp_path: Path) -> None:
    pytest.importorskip("pdfminer")
    made = write_pdf(tmp_path / "p.pdf", [line("一页", 50, 700)]).read_bytes()
    rows, _notices = read(write_zip(tmp_path / "a.zip", {"p.pdf": made, "bad.pdf": b"%PDF-1.4 nothing"}))
    assert [(Path(row.file).name, bool(row.problem)) for row in rows] == [("bad.pdf", True), ("p.pdf", False)]


def test_damage_costs_one_member_and_a_bomb_the_archive(tmp_path: Path) -> None:
    file = write_zip(tmp_path / "a.zip", {"a.txt": "第一行\n\n第二行\n" * 200, "b.txt": "第三行"})
    content = bytearray(file.read_bytes())
    content[60:64] = b"\xff\xff\xff\xff"
    file.write_bytes(content)
    rows, _notices = read(file)
    assert rows[-1].value == {"text": "第三行"} and rows[-2].reason == "damaged_file"
    with (
        zipfile.ZipFile(tmp_path / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as archive,
        archive.open("a.txt", "w") as member,
    ):
        for _block in range(300):
            member.write(b"a" * (1 << 20))
    with pytest.raises(DataError, match="would unpack"):
        read(tmp_path / "bomb.zip")


def test_an_encrypted_member(tmp_path: Path) -> None:
    file = write_zip(tmp_path / "a.zip", {"a.txt": "一", "b.txt": "二"})
    content = bytearray(file.read_bytes())
    for sign, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        content[content.index(sign) + offset] |= 1
    file.write_bytes(content)
    rows, _notices = read(file)
    assert [(row.reason, Path(row.file).name) for row in rows] == [("encrypted", "a.txt"), ("", "b.txt")]
