"""Lay out the pages of a PDF with pdfminer, under limits: a few kilobytes of a file can ask for hours of drawing."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pdfminer.converter import PDFPageAggregator
from pdfminer.layout import LAParams
from pdfminer.pdfinterp import PDFPageInterpreter, PDFResourceManager
from pdfminer.pdfpage import PDFPage

from tongwen.core.i18n import _

CONTENT = 4 << 20  # bytes of a page's operators; a page of text has some ten thousand
OBJECTS = 30_000  # characters and lines of a page
SECONDS = 10.0  # of CPU time


class PageTooLarge(Exception):
    """A page asks for more than a page of text needs."""


class LimitedDevice(PDFPageAggregator):
    """Collects what a page draws, up to the limits."""

    def begin_page(self, page: Any, ctm: Any) -> None:
        self.end = time.process_time() + SECONDS
        super().begin_page(page, ctm)

    def begin_figure(self, *args: Any) -> None:
        self._check()
        super().begin_figure(*args)

    def paint_path(self, *args: Any) -> None:
        self._check()
        super().paint_path(*args)

    def render_string(self, *args: Any) -> None:
        self._check()
        super().render_string(*args)

    def end_page(self, page: Any) -> None:
        self._check()
        super().end_page(page)

    def _check(self) -> None:
        if time.process_time() > self.end:
            raise PageTooLarge(_("it takes more than {seconds:g} seconds to draw").format(seconds=SECONDS))
        if len(self.cur_item) > OBJECTS:
            raise PageTooLarge(_("it draws more than {count:,} characters and lines").format(count=OBJECTS))


def read_pdf(file: Path) -> Iterator[Callable[[bool], Any]]:
    """Yield, for each page, a function that lays it out: (whether lines run from top to bottom) -> pdfminer's LTPage. It raises
    PageTooLarge."""
    resources = PDFResourceManager()

    def lay_out(page: Any, vertical: bool) -> Any:
        size = sum(
            len(stream.resolve().get_data()) if hasattr(stream, "resolve") else len(stream.get_data())
            for stream in page.contents
        )
        if size > CONTENT:
            raise PageTooLarge(
                _("its drawing has {size:,} bytes; the limit is {limit:,}").format(size=size, limit=CONTENT)
            )
        device = LimitedDevice(resources, laparams=LAParams(detect_vertical=vertical))
        PDFPageInterpreter(resources, device).process_page(page)
        return device.get_result()

    with file.open("rb") as stream:
        for page in PDFPage.get_pages(stream):
            yield lambda vertical, page=page: lay_out(page, vertical)  # type: ignore[misc]
