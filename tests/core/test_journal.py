"""Journals: a truncated journal keeps its complete lines and belongs to its own settings."""

from __future__ import annotations

import os
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


DAMAGED = [b"{\n", b"[]\n", b'{"m": 1}\n', b"\0\0\0\n", b"\xff\n", b"\n", b"[" * 100_000 + b"\n"]


@pytest.mark.parametrize("damage", DAMAGED)
@pytest.mark.parametrize("settings", [None, {"a": 1}])
def test_damaged_line_is_skipped_and_named(
    settings: Any, damage: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = 0 if settings is None else 1
    for place in range(first, first + 3):
        file = tmp_path / f"{place}.jsonl"
        lines = write(file, 1, 2, 3, settings=settings).splitlines(keepends=True)
        file.write_bytes(b"".join([*lines[:place], damage, *lines[place + 1 :]]))
        kept = [number for number in (1, 2, 3) if number != place - first + 1]
        assert read(file, settings=settings) == kept
        assert f"{file}:{place + 1}: this line is damaged" in capsys.readouterr().out
        write(file, 9, settings=settings)
        assert read(file, settings=settings) == [*kept, 9]


def test_damaged_settings_are_refused_with_their_place(tmp_path: Path) -> None:
    file = tmp_path / "journal.jsonl"
    lines = write(file, 1, settings={"a": 1}).splitlines(keepends=True)
    for damage in (b"{\n", b"\0\n", b"3\n"):
        file.write_bytes(damage + lines[1])
        with pytest.raises(ArtifactError, match=r"journal.jsonl:1: .*\n.*redo"):
            Entries(file, settings={"a": 1}, remedy="redo")
        assert file.read_bytes() == damage + lines[1]


def test_entries_are_synced_to_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each at once where it is paid for; else at least once a second, and at the end."""
    synced: list[int] = []
    clock = [100.0]
    monkeypatch.setattr("os.fsync", lambda handle: synced.append(os.fstat(handle).st_size))
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    for durable, expected in ((True, [9, 18, 27]), (False, [9, 27])):
        with Entries(tmp_path / str(durable), durable=durable) as journal:
            synced.clear()
            for seconds in (0, 0.5, 1):
                clock[0] += seconds
                journal.append({"n": 1})
            assert synced == expected
            journal.append({"n": 1})
        assert synced[-1] == 36
