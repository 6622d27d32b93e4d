"""The English of code, tests and documents is plain: they hold no phrase of a fixed list."""

from __future__ import annotations

import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# What to write instead: name the thing, in the active voice.
PHRASES = (
    "anew",  # again
    "as such",  # name it
    "is not to be had",  # is not available
    "is such",  # name it
    r"(?:is|are|was|were)(?: \w+){0,3} (?:said|told)",  # a notice says, tongwen reports, the user sees; gets, receives
    "so many",  # that number of
    "stands|stand|stood in",  # is in
    "that which",  # what
    "whoever",  # the user, a program
)
FORBIDDEN = re.compile(
    r"\b("
    + "|".join(re.sub(r"^([\w|]+\|\w+) ", r"(?:\1) ", phrase).replace(" ", r"\s+") for phrase in PHRASES)
    + r")\b",
    re.IGNORECASE,
)
PAGES = sorted([*ROOT.glob("README*.md"), *ROOT.glob("docs/*.md"), ROOT / "CHANGELOG.md"])
MODULES = sorted(
    file for folder in ("src", "tests", "scripts") for file in (ROOT / folder).rglob("*.py") if file != Path(__file__)
)
TABLES = sorted((ROOT / "src").rglob("*.yaml"))


def prose(file: Path) -> Iterator[tuple[int, str]]:
    """(line, text): comments, docstrings, texts and names of a module; a page without its examples."""
    source = file.read_text(encoding="utf-8")
    if file.suffix == ".py":
        for token in tokenize.generate_tokens(io.StringIO(source).readline):
            if token.type == tokenize.COMMENT or "STRING" in tokenize.tok_name[token.type]:
                yield token.start[0], token.string
            elif token.type == tokenize.NAME:
                yield token.start[0], token.string.replace("_", " ")
        return
    if file.suffix == ".md":
        source = re.sub(
            r"^```.*?^```", lambda found: re.sub(r".", "", found[0]), source, flags=re.DOTALL | re.MULTILINE
        )
    yield 1, source


def found_in(file: Path) -> list[str]:
    """`line: phrase` of each that stands in the file."""
    return [
        f"{line + text.count(chr(10), 0, found.start())}: {' '.join(found[0].split())}"
        for line, text in prose(file)
        for found in FORBIDDEN.finditer(text)
    ]


@pytest.mark.parametrize("file", [*PAGES, *MODULES, *TABLES], ids=lambda file: str(file.relative_to(ROOT)))
def test_no_forbidden_phrases(file: Path) -> None:
    assert not found_in(file)


def test_check_finds_forbidden_phrases(tmp_path: Path) -> None:
    file = tmp_path / "a.py"
    file.write_text(
        '"""What is\nsaid here."""\nx = "whoever stands in it"  # made anew\n'
        "def it_is_told() -> None: ...  # is measured and said; that is a long way from what he said\n"
    )
    assert found_in(file) == [
        "1: is said",
        "3: whoever",
        "3: stands in",
        "3: anew",
        "4: is told",
        "4: is measured and said",
    ]
