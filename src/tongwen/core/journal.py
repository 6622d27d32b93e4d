"""Append-only JSON lines files: after a kill the next process reads the finished entries and repeats none of them."""

from __future__ import annotations

import json
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from tongwen.core import console
from tongwen.core.artifact import differences, refuse_changed, sync_folder
from tongwen.core.errors import ArtifactError
from tongwen.core.i18n import _

SYNC_SECONDS = 1.0
Self = TypeVar("Self", bound="Journal")


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
        self._stream = file.open("ab")
        self._stream.truncate(size)
        sync_folder(file.parent)
        if not size:
            for line in header:
                self.append(line)

    @abstractmethod
    def load(self, entry: Any) -> None:
        """Load an entry that an earlier process wrote. Raises ValueError, KeyError or TypeError for a damaged entry."""

    def append(self, entry: Any) -> None:
        self._stream.write(json.dumps(entry, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n")
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
