"""Journals: a truncated journal keeps its complete lines and belongs to its own settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tongwen.core.errors import ArtifactError, RecipeError
from tongwen.core.journal import Journal


class Entries(Journal):
    def __init__(self, file: Path, **options: Any) -> None:
        self.entries: list[Any] = []
        super().__init__(file, **options)

    def load(self, entry: Any) -> None:
        self.entries.append(entry["n"])


def write(file: Path, *numbers: int, **options: Any) -> bytes:
    with Entries(file, **options) as journal:
        for number in numbers:
            journal.append({"n": number})
    return file.read_bytes()


def read(file: Path, **options: Any) -> list[Any]:
    with Entries(file, **options) as journal:
        return journal.entries


@pytest.mark.parametrize("options", [{}, {"settings": {"a": {"b": 1}}}, {"durable": True}])
def test_truncated_journal_keeps_its_complete_lines(options: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "new" / "journal.jsonl"
    whole = write(file, 1, 2, **options)
    first = len(whole.splitlines()) - 2  # lines of settings
    for cut in range(len(whole) + 1):
        file.write_bytes(whole[:cut])
        kept = list(range(1, whole[:cut].count(b"\n") - first + 1))
        assert read(file, **options) == kept
        write(file, 9, **options)
        assert read(file, **options) == [*kept, 9]


def test_file_format_matches_version_0_1(tmp_path: Path) -> None:
    assert write(tmp_path / "a", 1, settings={"名": "值"}) == '{"名": "值"}\n{"n": 1}\n'.encode()
    with Entries(tmp_path / "b") as journal:
        journal.append({"n": "\udcff"})  # half of a surrogate pair is no UTF-8
    assert (tmp_path / "b").read_bytes() == b'{"n": "\\udcff"}\n' and read(tmp_path / "b") == ["\udcff"]


def test_other_settings_are_refused_after_the_first_entry(tmp_path: Path) -> None:
    file = tmp_path / "journal.jsonl"
    write(file, settings={"a": 1})
    whole = write(file, 1, settings={"a": 2})
    with pytest.raises(RecipeError, match=r"a: 2 → 3.*\n.*redo"):
        Entries(file, settings={"a": 3}, remedy="redo")
    assert file.read_bytes() == whole


def test_damaged_line_is_reported_with_its_place(tmp_path: Path) -> None:
    for settings, bad in ((None, 1), ({"a": 1}, 1), ({"a": 1}, 2)):
        file = tmp_path / "journal.jsonl"
        file.unlink(missing_ok=True)
        lines = write(file, 1, 2, 3, settings=settings).splitlines(keepends=True)
        for damage in (b"{\n", b"[]\n", b'{"m": 1}\n'):
            if bad == 1 and settings and damage != b"{\n":
                continue  # settings of another run
            file.write_bytes(b"".join([*lines[: bad - 1], damage, *lines[bad:]]))
            with pytest.raises(ArtifactError, match=rf"journal.jsonl:{bad}: .*\n.*delete the line"):
                Entries(file, settings=settings)
