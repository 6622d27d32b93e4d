"""Append each answer to a file as it comes, so that an interrupted run continues with the missing ones."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tongwen.core.journal import Journal


class AnswerJournal(Journal):
    """Answers by row, all made with the same settings."""

    def __init__(self, file: Path, settings: Mapping[str, Any], remedy: str) -> None:
        self.answers: dict[int, str] = {}
        super().__init__(file, settings=settings, remedy=remedy)

    def load(self, entry: Any) -> None:
        row, answer = entry
        if not (isinstance(row, int) and isinstance(answer, str)):
            raise TypeError(entry)
        self.answers[row] = answer

    def add(self, row: int, answer: str) -> None:
        self.answers[row] = answer
        self.append([row, answer])
