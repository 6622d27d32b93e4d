"""How many characters of a text are kept on the way through PDF, Word, PowerPoint, EPUB, HTML and Markdown files.

    python bench/documents.py --text zh_docs.txt --out bench/results/documents.json

Ten files of each kind are made from ten parts of the text, which is the reference; PDF in one column, in two, and in vertical
lines. A character counts as kept when it stands in the result as often as in the reference; white space and the marks of Markdown
do not count. `order` is how alike the two sequences are (difflib's ratio): 1 when nothing was moved.
"""

from __future__ import annotations

import argparse
import difflib
import html
import json
import re
import sys
import tempfile
from collections import Counter
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[0] = str(ROOT)  # not bench/, whose gguf.py is another

from tests.data.office_documents import line, paragraph, write_docx, write_epub, write_pdf  # noqa: E402

from tongwen.data.reader import read_rows  # noqa: E402

CHARACTERS = 3000  # of a file
MARKS = re.compile(r"[\s\\*_|#`<>-]+")


def cut(text: str, width: int) -> list[str]:
    return [text[at : at + width] for at in range(0, len(text), width)]


def pdf(file: Path, paragraphs: list[str], columns: int = 1, vertical: bool = False) -> None:
    lines = [one for text in paragraphs for one in cut(text, 40 if vertical else 40 // columns)]
    pages = []
    for page in cut_list(lines, (30 if vertical else 50) * columns):
        if vertical:
            pages.append("".join(line(text, 540 - 17 * at, 780, "F2") for at, text in enumerate(page)))
        else:
            places = ((50 + 265 * (at // 50), 790 - 15 * (at % 50)) for at in range(len(page)))
            pages.append("".join(line(text, x, y) for text, (x, y) in zip(page, places, strict=True)))
    write_pdf(file, pages)


def cut_list(lines: list[str], size: int) -> list[list[str]]:
    return [lines[at : at + size] for at in range(0, len(lines), size)]


def pptx(file: Path, paragraphs: list[str]) -> None:
    from pptx import Presentation

    deck = Presentation()
    for text in paragraphs:
        slide = deck.slides.add_slide(deck.slide_layouts[1])
        slide.shapes.title.text, slide.placeholders[1].text = text[:20], text[20:]
    deck.save(str(file))


KINDS = {
    "pdf": pdf,
    "pdf, two columns": lambda file, texts: pdf(file, texts, columns=2),
    "pdf, vertical": lambda file, texts: pdf(file, texts, vertical=True),
    "docx": lambda file, texts: write_docx(file, "".join(paragraph(html.escape(text)) for text in texts)),
    "pptx": pptx,
    "epub": lambda file, texts: write_epub(file, [f"<p>{html.escape(text)}</p>" for text in texts]),
    "html": lambda file, texts: file.write_text(
        "<!doctype html><meta charset=utf-8>" + "".join(f"<p>{html.escape(text)}</p>" for text in texts), encoding="utf-8"
    ),
    "md": lambda file, texts: file.write_text("\n\n".join(texts), encoding="utf-8"),
}  # fmt: skip


def compare(reference: str, found: str) -> tuple[int, int, float]:
    """Return (characters, characters kept, likeness of the order)."""
    wanted, got = MARKS.sub("", reference), MARKS.sub("", html.unescape(found))
    kept = (Counter(wanted) & Counter(got)).total()
    return len(wanted), kept, difflib.SequenceMatcher(None, wanted, got, autojunk=False).ratio()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", required=True, type=Path)
    parser.add_argument("--files", type=int, default=10)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    paragraphs = [text for text in args.text.read_text(encoding="utf-8").splitlines() if len(text) > 30]
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        for kind, write in KINDS.items():
            characters, kept, orders, rest = 0, 0, [], iter(paragraphs)
            for number in range(args.files):
                part = list[str]()
                while sum(map(len, part)) < CHARACTERS:
                    part.append(next(rest).strip())
                file = Path(folder) / f"{number}.{kind.partition(',')[0]}"
                write(file, part)
                rows = list(read_rows(file))
                found = "\n".join(row.value["text"] for row in rows if not row.problem)
                of_file, kept_of_file, order = compare("\n".join(part), found)
                characters, kept = characters + of_file, kept + kept_of_file
                orders.append(order)
            results[kind] = {"files": args.files, "characters": characters, "kept": round(kept / characters, 5), "lowest_order": round(min(orders), 4)}  # fmt: skip
            print(kind, results[kind], flush=True)
    if args.out:
        versions = {name: metadata.version(name) for name in ("markitdown", "pdfminer.six", "mammoth", "python-pptx")}
        args.out.write_text(json.dumps({"versions": versions, "kinds": results}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
