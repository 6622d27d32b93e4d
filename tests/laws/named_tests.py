"""Tests that a page names."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).parents[2]


def exists(test: str) -> bool:
    """Return whether `tests/test_x.py::test_y` exists."""
    file, _, name = test.partition("::")
    return (ROOT / file).is_file() and f"\ndef {name}(" in (ROOT / file).read_text(encoding="utf-8")
