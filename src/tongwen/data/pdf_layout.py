"""Put the lines of a PDF's page in reading order: columns one after the other, the cells of a table row by row.

pdfminer orders blocks by their middle, so that a short right column comes before a long left one. Here a page is cut into bands
where nothing crosses the gap between them; bands that together fall into columns of prose are read column by column.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

PROSE_CHARACTERS, PROSE_LINES = 8, 3  # of a column: its mean line, and how many it has at least
PARAGRAPH = 0.8  # of a line's height: a larger gap begins a paragraph


def text_of(page: Any) -> str:
    """Return the text of a page that pdfminer has laid out."""
    from pdfminer.layout import LTTextBoxVertical

    boxes = [*_boxes(page)]
    if any(isinstance(box, LTTextBoxVertical) for box in boxes):  # from right to left, as pdfminer has them
        return "\n\n".join(box.get_text().strip() for box in boxes)
    lines = [line for box in boxes for line in box if line.get_text().strip()]
    return "\n\n".join(filter(None, (_in_order(lines), *_loose(page))))


def _boxes(part: Any) -> Iterator[Any]:
    from pdfminer.layout import LTFigure, LTTextBox

    for one in part:
        if isinstance(one, LTTextBox):
            yield one
        elif isinstance(one, LTFigure):
            yield from _boxes(one)


def _loose(part: Any) -> Iterator[str]:
    """Yield the texts inside of figures, where pdfminer makes no lines."""
    from pdfminer.layout import LTChar, LTFigure

    for figure in part:
        if isinstance(figure, LTFigure):
            yield "".join(one.get_text() for one in figure if isinstance(one, LTChar)).strip()
            yield from _loose(figure)


def _in_order(lines: list[Any]) -> str:
    bands, out, at = _apart(lines, "y"), list[str](), 0
    bands.reverse()  # PDF counts from below
    below: float | None = None
    while at < len(bands):
        end, columns = _columns(bands, at)
        band = [line for one in bands[at:end] for line in one]
        top, height = max(line.y1 for line in band), max(line.height for line in band)
        if out:
            out.append("\n\n" if below is None or below - top > PARAGRAPH * height or len(columns) > 1 else "\n")
        if len(columns) > 1:
            out.append("\n\n".join(map(_in_order, columns)))
            below = None
        else:
            out.append("  ".join(line.get_text().strip() for line in sorted(band, key=lambda line: line.x0)))
            below = min(line.y0 for line in band)
        at = end
    return "".join(out)


def _columns(bands: Sequence[list[Any]], begin: int) -> tuple[int, list[list[Any]]]:
    """Return (end, columns) of the longest run of bands from `begin` that falls into columns of prose; of one band, as it is,
    without such."""
    end, found = begin + 1, [bands[begin]]
    for stop in range(begin + 1, len(bands) + 1):
        columns = _apart([line for one in bands[begin:stop] for line in one], "x")
        if len(columns) < 2:
            break
        if all(map(_is_prose, columns)):
            end, found = stop, columns
    return end, found


def _is_prose(column: list[Any]) -> bool:
    characters = sum(len(line.get_text().strip()) for line in column)
    return len(column) >= PROSE_LINES and characters >= PROSE_CHARACTERS * len(column)


def _apart(lines: list[Any], axis: str) -> list[list[Any]]:
    """Return the lines in groups between which a gap runs over the whole page. axis: x for columns, y for bands."""
    groups: list[list[Any]] = []
    end = float("-inf")
    for line in sorted(lines, key=lambda line: float(getattr(line, f"{axis}0"))):
        low, high = getattr(line, f"{axis}0"), getattr(line, f"{axis}1")
        if low < end:
            groups[-1].append(line)
        else:
            groups.append([line])
        end = max(end, high)
    return groups
