"""What the README shows exists, in both languages."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from tongwen.cli.parser import make_parser
from tongwen.recipe.load import load_recipe

ROOT = Path(__file__).parents[2]
PAGES = ("README.md", "README_zh.md")


def blocks(page: str, kind: str) -> list[str]:
    return re.findall(rf"```{kind}\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL)


@pytest.mark.parametrize("page", PAGES)
def test_every_command_parses(page: str) -> None:
    lines = [line.split("  #")[0].strip() for block in blocks(page, "sh") for line in block.splitlines()]
    commands = [line for line in lines if line.startswith("tongwen ")]
    assert len(commands) >= 6
    for command in commands:
        make_parser().parse_args(shlex.split(command)[1:])
    targets = {
        line.split(":")[0]
        for line in (ROOT / "Makefile").read_text(encoding="utf-8").splitlines()
        if re.match(r"\w+:", line)
    }
    assert {line.split()[1] for line in lines if line.startswith("make ")} <= targets


@pytest.mark.parametrize("page", PAGES)
def test_shown_recipe_loads(page: str, tmp_path: Path) -> None:
    (block,) = blocks(page, "yaml")
    file = tmp_path / "recipe.yaml"
    file.write_text(block, encoding="utf-8")
    recipe, notices = load_recipe(file)
    assert recipe.stages == ["prepare", "sft", "merge", "export"]
    assert not notices


def test_both_languages_show_the_same() -> None:
    english, chinese = (
        [re.sub(r"\s*#.*", "", block) for kind in ("yaml", "python") for block in blocks(page, kind)] for page in PAGES
    )
    assert english == chinese
    rows = [len(re.findall(r"^\|", (ROOT / page).read_text(encoding="utf-8"), re.MULTILINE)) for page in PAGES]
    assert rows[0] == rows[1]


@pytest.mark.parametrize("page", [*PAGES, "CONTRIBUTING.md"])
def test_links_and_paths_exist(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (ROOT / page).parent.joinpath(link).exists(), link
    for file, name in re.findall(r"`((?:\w+/)*\w+\.py)`(?: `([\w.]+)`)?", text):
        source = ROOT / "src" / "tongwen" / file
        source = source if source.exists() else ROOT / file
        assert source.exists(), file
        assert not name or re.search(
            rf"(def|class) {name.split('.')[-1]}\b|^    {name.split('.')[-1]}:",
            source.read_text(encoding="utf-8"),
            re.MULTILINE,
        ), f"{file} has no {name}"


@pytest.mark.parametrize("ending", ["", "_zh"])
def test_memory_table_matches_its_page(ending: str) -> None:
    page, readme = (
        (ROOT / file).read_text(encoding="utf-8") for file in (f"docs/memory{ending}.md", f"README{ending}.md")
    )
    table = [line for line in page.splitlines() if line.startswith("|")]
    assert len(table) > 5 and "\n".join(["<!-- memory -->", *table, "<!-- /memory -->"]) in readme
