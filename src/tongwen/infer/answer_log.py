"""Answers as they come, one line each: a run that was killed goes on with what is missing."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tongwen.core import artifact


class AnswerJournal:
    """A file of answers by row. Raises RecipeError when it was begun with other settings."""

    def __init__(self, file: Path, settings: Mapping[str, Any], remedy: str) -> None:
        self.answers: dict[int, str] = {}
        wanted = json.loads(json.dumps(settings))
        whole = self._read(file, wanted, remedy) if file.is_file() else 0
        file.parent.mkdir(parents=True, exist_ok=True)
        self._stream = file.open("r+b" if whole else "wb")
        self._stream.seek(whole)
        self._stream.truncate()  # a line that was being written when the process died
        if not whole:
            self._write(wanted)

    def add(self, row: int, answer: str) -> None:
        self.answers[row] = answer
        self._write([row, answer])

    def close(self) -> None:
        os.fsync(self._stream.fileno())
        self._stream.close()

    def _write(self, value: Any) -> None:
        self._stream.write(json.dumps(value, ensure_ascii=False).encode() + b"\n")
        self._stream.flush()

    def _read(self, file: Path, wanted: Mapping[str, Any], remedy: str) -> int:
        """How many bytes of it are whole lines; 0 for a file without an answer, which binds nobody."""
        head, *lines = [line for line in file.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")] or [b""]
        if not lines:
            return 0
        artifact.refuse_changed(str(file), artifact.differences(json.loads(head), wanted), remedy)
        self.answers.update(json.loads(line) for line in lines)
        return len(head) + sum(map(len, lines))
