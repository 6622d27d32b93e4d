"""Files that grow a JSON line at a time: what a killed process wrote is there for the next one, and nothing is done twice."""

from __future__ import annotations

import json
import os
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from tongwen.core.artifact import differences, refuse_changed
from tongwen.core.errors import ArtifactError
from tongwen.core.i18n import _

Self = TypeVar("Self", bound="Journal")


class Journal(ABC):
    """A file of entries that are only ever added.

    A last line that a kill cut in the middle is taken off when the file is opened again.
    """

    def __init__(
        self, file: Path, *, settings: Mapping[str, Any] | None = None, remedy: str = "", durable: bool = False
    ) -> None:
        """settings: what the entries depend on; they stand in the first line. remedy: for a file with other settings.
        durable: whether an entry is on the disk when `append` returns; else it is when the journal is closed.

        Raises RecipeError when the file was begun with other settings, ArtifactError for a damaged line.
        """
        self.file, self.durable = file, durable
        header = [] if settings is None else [json.loads(json.dumps(settings))]
        size = self._read(header, remedy) if file.is_file() else 0
        file.parent.mkdir(parents=True, exist_ok=True)
        self._stream = file.open("ab")
        self._stream.truncate(size)
        if not size:
            for line in header:
                self.append(line)

    @abstractmethod
    def load(self, entry: Any) -> None:
        """Take in an entry that an earlier process has written. Raises ValueError, KeyError or TypeError for one that is
        damaged."""

    def append(self, entry: Any) -> None:
        self._stream.write(json.dumps(entry, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n")
        self._stream.flush()
        if self.durable:
            os.fsync(self._stream.fileno())

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
        """How many bytes stay: whole lines alone, and none of a file without an entry, whose settings bind nobody."""
        lines = [line for line in self.file.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]
        size = 0
        for number, line in enumerate(lines if len(lines) > len(header) else [], 1):
            try:
                if number > len(header):
                    self.load(json.loads(line))
                else:
                    refuse_changed(str(self.file), differences(dict(json.loads(line)), header[0]), remedy)
            except (ValueError, KeyError, TypeError):
                if number == len(lines):
                    break
                raise ArtifactError(
                    _("this line of the journal is damaged"),
                    place=f"{self.file}:{number}",
                    remedy=_("delete the line: its answer will be requested again"),
                ) from None
            size += len(line)
        return size
