"""Small PDF, Word, PowerPoint, EPUB and HTML files, written by hand, so that the tests know each of their parts."""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Sequence
from pathlib import Path

W = 'xmlns:w="http://schemas.openxmlformats.org/wordprocessingml/2006/main"'
RELATIONS = "http://schemas.openxmlformats.org/officeDocument/2006/relationships"
PADDING = bytes.fromhex("28bf4e5e4e758a4164004e56fffa01082e2e00b6d0683e802f0ca9fe6453697a")


def write_zip(file: Path, parts: dict[str, str | bytes]) -> Path:
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in parts.items():
            archive.writestr(name, content)
    return file


def paragraph(text: str, style: str = "") -> str:
    styled = f'<w:pPr><w:pStyle w:val="{style}"/></w:pPr>' if style else ""
    return f"<w:p>{styled}<w:r><w:t>{text}</w:t></w:r></w:p>"


def table(rows: Sequence[Sequence[str]]) -> str:
    cells = "".join("<w:tr>" + "".join(f"<w:tc>{paragraph(cell)}</w:tc>" for cell in row) + "</w:tr>" for row in rows)
    return f"<w:tbl>{cells}</w:tbl>"


def write_docx(file: Path, body: str, footnote: str = "", header: str = "") -> Path:
    note = f'<w:footnotes {W}><w:footnote w:id="1">{paragraph(footnote)}</w:footnote></w:footnotes>'
    related = [("styles", "styles.xml"), ("footnotes", "footnotes.xml"), ("header", "header1.xml")]
    heading = '<w:style w:type="paragraph" w:styleId="Heading1"><w:name w:val="heading 1"/></w:style>'
    types = "".join(
        f'<Override PartName="/word/{part}.xml" ContentType="application/vnd.openxmlformats-officedocument.wordprocessingml.{kind}+xml"/>'
        for part, kind in (("document", "document.main"), ("styles", "styles"), ("footnotes", "footnotes"), ("header1", "header"))
    )  # fmt: skip
    rels = "".join(
        f'<Relationship Id="r{n}" Type="{RELATIONS}/{kind}" Target="{name}"/>' for n, (kind, name) in enumerate(related)
    )
    namespace = 'xmlns="http://schemas.openxmlformats.org/package/2006/relationships"'
    return write_zip(
        file,
        {
            "[Content_Types].xml": '<Types xmlns="http://schemas.openxmlformats.org/package/2006/content-types">'
            f'<Default Extension="rels" ContentType="application/vnd.openxmlformats-package.relationships+xml"/>{types}</Types>',
            "_rels/.rels": f'<Relationships {namespace}><Relationship Id="r" Type="{RELATIONS}/officeDocument" Target="word/document.xml"/></Relationships>',
            "word/_rels/document.xml.rels": f"<Relationships {namespace}>{rels}</Relationships>",
            "word/document.xml": f"<w:document {W}><w:body>{body}</w:body></w:document>",
            "word/styles.xml": f"<w:styles {W}>{heading}</w:styles>",
            "word/footnotes.xml": note,
            "word/header1.xml": f"<w:hdr {W}>{paragraph(header)}</w:hdr>",
        },
    )


def write_epub(file: Path, chapters: Sequence[str]) -> Path:
    items = "".join(
        f'<item id="c{n}" href="c{n}.xhtml" media-type="application/xhtml+xml"/>' for n in range(len(chapters))
    )
    spine = "".join(f'<itemref idref="c{n}"/>' for n in range(len(chapters)))
    parts: dict[str, str | bytes] = {
        "mimetype": "application/epub+zip",
        "META-INF/container.xml": '<container xmlns="urn:oasis:names:tc:opendocument:xmlns:container"><rootfiles><rootfile full-path="b.opf"/></rootfiles></container>',
        "b.opf": f'<package xmlns:dc="http://purl.org/dc/elements/1.1/"><metadata><dc:title>书名</dc:title></metadata><manifest>{items}</manifest><spine>{spine}</spine></package>',
    }
    return write_zip(
        file, parts | {f"c{n}.xhtml": f"<html><body>{text}</body></html>" for n, text in enumerate(chapters)}
    )


# -- PDF -----------------------------------------------------------------------------------------------------------


def line(text: str, x: int, y: int, font: str = "F1") -> str:
    return f"BT /{font} 12 Tf {x} {y} Td <{text.encode('utf-16-be').hex()}> Tj ET\n"


PICTURE = "q 100 0 0 100 50 50 cm /I1 Do Q\n"


def write_pdf(file: Path, pages: Sequence[str], password: str = "", cids: bool = False) -> Path:
    """pages: content streams of `line` and PICTURE. cids: fonts whose glyphs name no character."""
    fonts = ("Identity-H", "Identity-H") if cids else ("UniGB-UTF16-H", "UniGB-UTF16-V")
    order = "Identity" if cids else "GB1"
    objects = [b"<</Type/Catalog/Pages 2 0 R>>", b""]
    for encoding in fonts:
        number = len(objects) + 1
        objects.append(
            f"<</Type/Font/Subtype/Type0/BaseFont/S/Encoding/{encoding}/DescendantFonts[{number + 1} 0 R]>>".encode()
        )
        objects.append(
            f"<</Type/Font/Subtype/CIDFontType0/BaseFont/S/CIDSystemInfo<</Registry(Adobe)/Ordering({order})/Supplement 2>>/DW 1000"
            "/FontDescriptor<</Type/FontDescriptor/FontName/S/Flags 4/Ascent 880/Descent -120/FontBBox[0 -120 1000 880]>>>>".encode()
        )  # fmt: skip
    objects.append(
        b"<</Type/XObject/Subtype/Image/Width 1/Height 1/ColorSpace/DeviceGray/BitsPerComponent 8/Length 1>>stream\n\0\nendstream"
    )
    picture, kids = len(objects), []
    key, encryption = _encryption(password) if password else (b"", "")
    for content in pages:
        stream = content.encode()
        if key:
            stream = _rc4(hashlib.md5(key + (len(objects) + 1).to_bytes(3, "little") + b"\0\0").digest()[:10], stream)
        objects.append(f"<</Length {len(stream)}>>stream\n".encode() + stream + b"\nendstream")
        fonts_used = f"/Font<</F1 3 0 R/F2 5 0 R>>/XObject<</I1 {picture} 0 R>>"
        objects.append(
            f"<</Type/Page/Parent 2 0 R/MediaBox[0 0 595 842]/Contents {len(objects)} 0 R/Resources<<{fonts_used}>>>>".encode()
        )
        kids.append(f"{len(objects)} 0 R")
    objects[1] = f"<</Type/Pages/Count {len(kids)}/Kids[{' '.join(kids)}]>>".encode()
    out, places = b"%PDF-1.4\n", []
    for number, content in enumerate(objects, 1):
        places.append(len(out))
        out += f"{number} 0 obj\n".encode() + content + b"\nendobj\n"
    table_at = len(out)
    entries = "".join(f"{place:010d} 00000 n \n" for place in places)
    trailer = f"xref\n0 {len(objects) + 1}\n0000000000 65535 f \n{entries}trailer<</Size {len(objects) + 1}/Root 1 0 R{encryption}>>\nstartxref\n{table_at}\n%%EOF"
    file.write_bytes(out + trailer.encode())
    return file


def _encryption(password: str) -> tuple[bytes, str]:
    """The 40-bit key of a user's password, and the entries of the trailer (PDF 32000-1, 7.6.3)."""
    padded = (password.encode() + PADDING)[:32]
    owner = _rc4(hashlib.md5(padded).digest()[:5], padded)
    key = hashlib.md5(padded + owner + (-4 & 0xFFFFFFFF).to_bytes(4, "little") + b"id").digest()[:5]
    user = _rc4(key, PADDING)
    return (
        key,
        f"/ID[<{b'id'.hex()}><{b'id'.hex()}>]/Encrypt<</Filter/Standard/V 1/R 2/O<{owner.hex()}>/U<{user.hex()}>/P -4>>",
    )


def _rc4(key: bytes, data: bytes) -> bytes:
    state, j = list(range(256)), 0
    for i in range(256):
        j = (j + state[i] + key[i % len(key)]) % 256
        state[i], state[j] = state[j], state[i]
    i = j = 0
    out = bytearray()
    for byte in data:
        i = (i + 1) % 256
        j = (j + state[i]) % 256
        state[i], state[j] = state[j], state[i]
        out.append(byte ^ state[(state[i] + state[j]) % 256])
    return bytes(out)
