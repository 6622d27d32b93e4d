"""Read PDF, Word, PowerPoint, EPUB and HTML files as documents: a page or a slide is a row, and so is a file without either.

markitdown writes them as Markdown, with tables, notes and formulas; PDF is read by pdfminer.six, which markitdown uses as well,
because it knows the pages. A page that holds no text is a row with its reason: the rest of the file is read.
"""

from __future__ import annotations

import html
import io
import logging
import posixpath
import re
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from tongwen.core.errors import MissingPackage, first_line
from tongwen.core.i18n import _
from tongwen.data.files import DamagedFile, check_unpacked_size
from tongwen.data.pdf_layout import text_of
from tongwen.data.row import CAP, RawRow

Notify = Callable[[str], None]
# Reasons for which a page, a document or a member of an archive has no row.
UNREADABLE = frozenset(
    (
        "scanned_page",
        "unknown_glyphs",
        "no_text",
        "encrypted",
        "damaged_file",
        "unreadable_file",
        "nested_archive",
        "too_large",
    )
)
SLIDE = re.compile(r"<!-- Slide number: (\d+) -->\n?")
UNMAPPED = re.compile(r"\(cid:\d+\)")  # a glyph for which the file names no character
CAPTION = 20  # characters beside a picture that fills a page
MOST_UNMAPPED = 0.02  # share of a page's characters
# The parts of a file that hold text, and the elements with it.
TEXT_PARTS = re.compile(
    r"word/(?:document|footnotes|endnotes|comments|header\d*|footer\d*)\.xml"
    r"|ppt/(?:slides|notesSlides|comments)/[^/]+\.xml|(?:word|ppt)/(?:diagrams/data|charts/chart)\d+\.xml"
)
RUNS = re.compile(r"<(?:w:t|a:t|p:text)(?:\s[^>]*)?>([^<]*)</(?:w:t|a:t|p:text)>")
ENCRYPTION = "META-INF/encryption.xml"  # of an EPUB
CHAPTER = re.compile(r"<item\b[^>]*\bhref=[\"']([^\"']+\.x?html?)[\"']")
MARKUP = re.compile(r"[\s\\*_|#]+")


def read_pages(file: Path, kind: str, name: str, encoding: str, notify: Notify) -> Iterator[RawRow]:
    """Yield the pages of a file. kind: pdf, docx, pptx, epub or html; encoding: of HTML."""
    reader = _pdf_pages if kind == "pdf" else _markdown_pages
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for number, text, reason, problem in reader(file, kind, encoding, notify):
                size = len(text.encode("utf-8", "surrogatepass"))
                if size > CAP:
                    reason, problem = (
                        "too_large",
                        _("this page has {size:,} bytes; the limit is {cap:,}").format(size=size, cap=CAP),
                    )
                value: Any = text[:200] if problem else {"text": text}
                yield RawRow(name, number, value, size, problem, reason)
    except (DamagedFile, MissingPackage):
        raise
    except Exception as error:  # the libraries raise whatever a damaged part makes them meet
        if "password" in type(error).__name__.lower() or "encrypt" in str(error).lower():
            yield _unreadable(name, _("it is encrypted: save it without a password"), "encrypted")
        else:
            rule = _("this {kind} file is damaged: {reason}").format(kind=kind, reason=first_line(error)[:200])
            yield _unreadable(name, rule, "damaged_file")


def _unreadable(name: str, rule: str, reason: str) -> RawRow:
    return RawRow(name, 1, "", 0, rule, reason)


Page = tuple[int, str, str, str]  # number, text, and reason and problem when it cannot be used


# -- PDF -----------------------------------------------------------------------------------------------------------


def _pdf_pages(file: Path, kind: str, encoding: str, notify: Notify) -> Iterator[Page]:
    try:
        from tongwen.data.pdf_pages import PageTooLarge, read_pdf
    except ImportError:
        raise _missing("pdfminer.six", "PDF") from None
    logging.getLogger("pdfminer").setLevel(logging.ERROR)  # it warns of each odd operator
    empty, total = list[int](), 0
    for number, lay_out in enumerate(read_pdf(file), 1):
        total = number
        try:
            page = lay_out(False)
            text = text_of(page)
            if _is_vertical(text):  # where lines are horizontal, it would join those of one character
                text = text_of(lay_out(True))
        except PageTooLarge as error:
            yield number, "", "too_large", _("page {number}: {reason}").format(number=number, reason=error)
            continue
        if len(text) < CAPTION and (not text or _has_picture(page, 0.5)):  # a scan may have its number as text
            if _has_picture(page):
                rule = _("page {number} holds a picture and no text: it needs OCR").format(number=number)
                yield number, "", "scanned_page", rule
            else:
                empty.append(number)
            continue
        unmapped = UNMAPPED.findall(text)
        text = UNMAPPED.sub("", text)
        if len(unmapped) > MOST_UNMAPPED * (len(text) + len(unmapped)):
            rule = _("page {number}: for {count} of {total} glyphs the file names no character: it needs OCR").format(
                number=number, count=len(unmapped), total=len(text) + len(unmapped)
            )
            yield number, text, "unknown_glyphs", rule
            continue
        if unmapped:
            notify(
                _("page {number}: {count} glyphs without a character are left out").format(
                    number=number, count=len(unmapped)
                )
            )
        yield number, text, "", ""
    if empty and len(empty) == total:
        yield 1, "", "no_text", _("none of its pages holds a text or a picture")


def _is_vertical(text: str) -> bool:
    """Whether a page's lines run from top to bottom: read as horizontal ones, most have one character."""
    lines = text.split()
    return len(lines) > 4 and sum(len(line) == 1 for line in lines) > 0.5 * len(lines)


def _has_picture(page: Any, share: float = 0.0) -> bool:
    """Whether a page holds a picture that covers more than this share of it."""
    from pdfminer.layout import LTFigure, LTImage

    area = max(page.width * page.height, 1)
    return any(isinstance(one, (LTImage, LTFigure)) and one.width * one.height > share * area for one in page)


# -- the rest ------------------------------------------------------------------------------------------------------


def _markdown_pages(file: Path, kind: str, encoding: str, notify: Notify) -> Iterator[Page]:
    try:
        from markitdown import StreamInfo
        from markitdown.converters import DocxConverter, EpubConverter, HtmlConverter, PptxConverter
    except ImportError:
        raise _missing("markitdown", kind) from None
    converters = {"docx": DocxConverter, "pptx": PptxConverter, "epub": EpubConverter, "html": HtmlConverter}
    if kind != "html":
        with zipfile.ZipFile(file) as archive:
            check_unpacked_size(file, sum(part.file_size for part in archive.infolist()))
            if ENCRYPTION in archive.namelist():
                yield 1, "", "encrypted", _("it is encrypted: save it without a password")
                return
            if kind == "epub":
                _name_lost_chapters({*archive.namelist()}, archive, notify)
    content = file.read_bytes()
    found = converters[kind]().convert(io.BytesIO(content), StreamInfo(extension=f".{kind}", charset=encoding))
    title = (found.title or "").strip() if kind == "html" else ""
    text = f"# {title}\n\n{found.markdown}" if title and title not in found.markdown else found.markdown
    if kind in ("docx", "pptx"):
        _name_lost_parts(file, text, notify)
    pages = SLIDE.split(text)
    slides = [("1", pages[0]), *zip(pages[1::2], pages[2::2], strict=True)]
    full = [(int(number), page.strip()) for number, page in slides if page.strip()]
    for number, page in full:
        yield number, page, "", ""
    if not full:
        yield 1, "", "no_text", _("it holds no text")


def _name_lost_chapters(names: set[str], archive: zipfile.ZipFile, notify: Notify) -> None:
    """Name the chapters that an EPUB lists and does not hold."""
    for package in (name for name in names if name.endswith(".opf")):
        text = archive.read(package).decode("utf-8", "replace")
        folder = package.rpartition("/")[0]
        for item in CHAPTER.findall(text):
            place = posixpath.normpath(posixpath.join(folder, unquote(html.unescape(item))))
            if place not in names:
                notify(_("{chapter} is listed in the book, but the file does not hold it").format(chapter=place))


def _name_lost_parts(file: Path, text: str, notify: Notify) -> None:
    """Name the parts of a file whose text is not in the result, such as headers and footers."""
    plain = MARKUP.sub("", html.unescape(text))
    with zipfile.ZipFile(file) as archive:
        for part in sorted(filter(TEXT_PARTS.fullmatch, archive.namelist())):
            content = archive.read(part).decode("utf-8", "replace")
            runs = [MARKUP.sub("", html.unescape(run)) for run in RUNS.findall(content)]
            never = part.startswith(("word/header", "word/footer"))
            if lost := [run for run in runs if run and (never or run not in plain)]:
                notify(
                    _("{count} characters of {part} are not read, such as {text!r}").format(
                        count=sum(map(len, lost)), part=part, text=lost[0][:40]
                    )
                )


def _missing(package: str, kind: str) -> MissingPackage:
    return MissingPackage(package, _("{kind} files").format(kind=kind), "documents")
