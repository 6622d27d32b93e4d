"""docs/checklist.md: ninety-five rows, and what each names is there."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from tests.laws.named_tests import exists
from tongwen.cli.parser import make_parser

ROOT = Path(__file__).parents[2]
ROWS = [
    (int(row[1]), row[2])
    for row in re.finditer(r"^\| (\d+) \| [^|]+ \| (.+) \|$", (ROOT / "docs" / "checklist.md").read_text("utf-8"), re.MULTILINE)
]  # fmt: skip


def test_each_row_names_a_test_or_a_command() -> None:
    assert [number for number, _ in ROWS] == list(range(1, 96))
    for number, shown in ROWS:
        named = re.findall(r"`([^`]+)`", shown)
        assert named, number
        for name in named:
            if name.startswith("tongwen "):
                make_parser().parse_args(shlex.split(name)[1:])
            else:
                assert exists(name), f"{number}: {name}"


def test_migration_page_commands_parse() -> None:
    pages = [(ROOT / "docs" / f"from-older-projects{ending}.md").read_text("utf-8") for ending in ("", "_zh")]
    blocks = [re.findall(r"```sh\n(.*?)```", page, re.DOTALL) for page in pages]
    assert blocks[0] == blocks[1]
    inline = [re.findall(r"`(tongwen [^`…]+)`", page) for page in pages]
    assert [line for line in inline[0] if "recipe" in line] and len(inline[0]) == len(inline[1])
    for line in [*"".join(blocks[0]).splitlines(), *inline[0], *inline[1]]:
        make_parser().parse_args(shlex.split(line)[1:] if line != "tongwen migrate --" else ["migrate", "x"])
