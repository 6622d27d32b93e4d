"""The commands that take a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest


def test_overrides_are_accepted_anywhere(tongwen: Any, tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text('{"instruction": "问", "output": "答"}\n', encoding="utf-8")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"name: a\nbase: nowhere\nprepare: {{dialogues: {data}}}\nsft: {{}}\n")
    for order in (("sft.max_length=no", "--json"), ("--json", "sft.max_length=no")):
        code, out, err = tongwen("check", recipe, *order)
        assert code == 2 and "max_length" in out + err
    with pytest.raises(SystemExit):
        tongwen("check", recipe, "--jsn", "sft.max_length=9")
