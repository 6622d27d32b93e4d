"""Append-only JSON lines files: after a kill the next process reads the finished entries and repeats none of them."""

from __future__ import annotations

import json
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Set
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from tongwen.core import console
from tongwen.core.artifact import differences, refuse_changed, write_text
from tongwen.core.errors import ArtifactError, RecipeError
from tongwen.core.i18n import _

SYNC_SECONDS = 1.0
Self = TypeVar("Self", bound="Journal")


def check_journal(file: Path, keys: Set[str]) -> None:
    """Raise RecipeError if a file in a journal's place is none: its first line, the settings, lacks these keys."""
    if not os.path.lexists(file) or (file.is_file() and not file.stat().st_size):
        return
    try:
        with file.open("rb") as stream:
            line = stream.readline()
        if line.endswith(b"\n") and keys <= json.loads(line).keys():
            return
    except (OSError, ValueError, AttributeError):
        pass
    raise RecipeError(
        _("the answers are kept under this name, but tongwen did not write this file"),
        place=str(file),
        remedy=_("move it away, or choose another output"),
    )


class Journal(ABC):
    """An append-only file of entries, one JSON line each.

    Opening the file again removes a last line that a kill cut in the middle.
    """

    def __init__(
        self, file: Path, *, settings: Mapping[str, Any] | None = None, remedy: str = "", durable: bool = False
    ) -> None:
        """settings: what the entries depend on, kept in the first line. remedy: for the error about other settings.
        durable: sync every entry to disk before `append` returns; otherwise once a second, and when it is closed.

        Raises RecipeError when the file was started with other settings, ArtifactError when its settings are damaged. A
        damaged entry is skipped with a notice.
        """
        self.file, self.durable, self._synced = file, durable, 0.0
        header = [] if settings is None else [json.loads(json.dumps(settings))]
        size = self._read(header, remedy) if file.is_file() else 0
        file.parent.mkdir(parents=True, exist_ok=True)
        if not size:  # in one step, so that the first line of a journal is always whole
            write_text(file, b"".join(map(_to_line, header)).decode())
        self._stream = file.open("ab")
        if size:
            self._stream.truncate(size)

    @abstractmethod
    def load(self, entry: Any) -> None:
        """Load an entry that an earlier process wrote. Raises ValueError, KeyError or TypeError for a damaged entry."""

    def append(self, entry: Any) -> None:
        self._stream.write(_to_line(entry))
        self._stream.flush()
        if self.durable or time.monotonic() > self._synced + SYNC_SECONDS:
            os.fsync(self._stream.fileno())
            self._synced = time.monotonic()

    def close(self) -> None:
        os.fsync(self._stream.fileno())
        self._stream.close()

    def __enter__(self: Self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _read(self, header: list[Any], remedy: str) -> int:
        """Load the entries; return the bytes to keep: whole lines only, and 0 for a file without entries (its settings may
        change)."""
        lines = [line for line in self.file.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]
        if len(lines) <= len(header):
            return 0
        for settings, line in zip(header, lines, strict=False):
            refuse_changed(str(self.file), differences(self._settings_in(line, remedy), settings), remedy)
        for number, line in enumerate(lines[len(header) :], len(header) + 1):
            try:
                self.load(json.loads(line))
            except (ValueError, KeyError, TypeError, RecursionError):
                console.notice(
                    _("{place}: this line is damaged and counts as missing").format(place=f"{self.file}:{number}")
                )
        return sum(map(len, lines))

    def _settings_in(self, line: bytes, remedy: str) -> dict[str, Any]:
        try:
            return dict(json.loads(line))
        except (ValueError, TypeError, RecursionError):
            raise ArtifactError(
                _("this line of the journal is damaged: it held the settings of the entries"),
                place=f"{self.file}:1",
                remedy=remedy,
            ) from None


def _to_line(entry: Any) -> bytes:
    return json.dumps(entry, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"
