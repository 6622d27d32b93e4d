"""Each page of docs/ is there in English and in Chinese, and both hold the same."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
ENGLISH = sorted(page.stem for page in DOCS.glob("*.md") if not page.stem.endswith("_zh"))
PAGES = sorted(page.name for page in DOCS.glob("*.md"))
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
COMMAND = re.compile(r"`((?:tongwen|pip|make|export|python|bash) [^`]+)`")
TRANSLATED = {"cli"}  # its blocks are what `--help` prints in each language


def twins(name: str) -> tuple[str, str]:
    english, chinese = ((DOCS / f"{name}{ending}.md").read_text(encoding="utf-8") for ending in ("", "_zh"))
    return english, chinese


def prose(page: str) -> str:
    return BLOCK.sub("", page)


def blocks(page: str) -> list[tuple[str, list[str]]]:
    """(language, lines without comments) of each block of code."""
    return [
        (kind, [re.sub(r"(^|\s+)# .*", "", line).rstrip() for line in text.splitlines()])
        for kind, text in BLOCK.findall(page)
    ]


def headings(page: str) -> list[str]:
    """The level of each heading."""
    return re.findall(r"^(#+) ", prose(page), re.MULTILINE)


def rows(page: str) -> list[int]:
    """The cells of each row of each table."""
    lines = re.findall(r"^\|.*", prose(page), re.MULTILINE)
    return [line.replace("\\|", "").count("|") for line in lines]


def commands(page: str) -> list[str]:
    """The commands inside of sentences, in any order."""
    return sorted({" ".join(command.split()) for command in COMMAND.findall(prose(page))})


def figures(page: str) -> set[str]:
    """All numbers; a million is written in another way in Chinese."""
    page = re.sub(r"\d+ million|\d+ ?万", "", page)
    return set(re.findall(r"\d+(?:[.,]\d+)*", page))


def destination(link: str) -> str:
    """Where a link leads, in either language."""
    return link.replace("_zh.", ".")


def test_no_page_lacks_its_twin() -> None:
    assert len(ENGLISH) > 20
    assert sorted(f"{name}{ending}.md" for name in ENGLISH for ending in ("", "_zh")) == PAGES


@pytest.mark.parametrize("name", ENGLISH)
def test_twins_hold_the_same(name: str) -> None:
    english, chinese = twins(name)
    assert headings(english) == headings(chinese)
    assert rows(english) == rows(chinese)
    assert commands(english) == commands(chinese)
    assert not figures(english) - figures(chinese)
    if name not in TRANSLATED:
        assert blocks(english) == blocks(chinese)
    ends = [sorted(map(destination, LINK.findall(prose(page).split("\n", 3)[3]))) for page in (english, chinese)]
    assert ends[0] == ends[1]


@pytest.mark.parametrize("name", ENGLISH)
def test_twins_link_to_each_other_below_the_title(name: str) -> None:
    heads = [page.split("\n")[1:4] for page in twins(name)]
    assert heads == [["", f"[中文]({name}_zh.md)", ""], ["", f"[English]({name}.md)", ""]]


@pytest.mark.parametrize("name", ENGLISH)
def test_paragraphs_of_chinese_pages_are_chinese(name: str) -> None:
    chinese = re.sub(r"`[^`]*`|\]\([^)]*\)", "", prose(twins(name)[1]))
    english = [part for part in chinese.split("\n\n") if not re.search("[\u4e00-\u9fff]", part)]
    assert not [part for part in english if len(re.findall("[A-Za-z]+", part)) > 3]


@pytest.mark.parametrize("page", [*(f"docs/{name}" for name in PAGES), "README.md", "README_zh.md"])
def test_links_resolve_in_their_own_language(page: str) -> None:
    text = prose((ROOT / page).read_text(encoding="utf-8"))
    other = {f"{name}.md" for name in ENGLISH} if page.endswith("_zh.md") else {f"{name}_zh.md" for name in ENGLISH}
    for line in text.splitlines():
        for link in LINK.findall(line):
            if link.startswith(("http", "#")):
                continue
            target = (ROOT / page).parent / link.partition("#")[0]
            assert target.exists(), link
            is_twin = line in (f"[中文]({link})", f"[English]({link})")
            assert is_twin or target.parent.resolve() != DOCS or target.name not in other, link


@pytest.mark.parametrize("ending", ["", "_zh"])
def test_every_reason_of_a_rejected_row_is_explained(ending: str) -> None:
    page = (DOCS / f"errors{ending}.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`([a-z_]+)`", page))
    reasons = {
        reason
        for folder in ("data", "core")
        for file in (ROOT / "src" / "tongwen" / folder).rglob("*.py")
        for reason in re.findall(r'Rejected(?:Text)?\(\s*"([a-z_]+)"', file.read_text(encoding="utf-8"))
    }
    assert len(reasons) > 30
    assert not {reason for reason in reasons if not reason.startswith("bad_")} - named
