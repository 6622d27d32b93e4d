"""Recipes of a few lines, and what must be true of their problems."""

from __future__ import annotations

from pathlib import Path

import pytest

from tongwen.core.errors import SeveralErrors, TongwenError
from tongwen.recipe.load import load_recipe

PRETRAIN = "name: a\nbase: b\nprepare: {documents: d}\npretrain: {%s}\n"
SFT = "name: a\nbase: b\nprepare: {dialogues: d.json}\nsft: {%s}\n"


def write(folder: Path, text: str) -> Path:
    file = folder / "recipe.yaml"
    file.write_text(text, encoding="utf-8")
    return file


def problems(file: Path, *overrides: str) -> list[TongwenError]:
    with pytest.raises(TongwenError) as caught:
        load_recipe(file, overrides)
    assert caught.value.exit_code == 2
    return caught.value.errors if isinstance(caught.value, SeveralErrors) else [caught.value]


def check_problem(folder: Path, text: str, line: int, value: str, remedy: str) -> None:
    """The recipe has one problem; its message holds the line, the value and the remedy."""
    (found,) = problems(write(folder, text))
    message = found.text()
    assert f"recipe.yaml:{line}" in message
    assert value in message
    assert remedy in message
