"""Paid replies, one JSON line each, synced to disk before they are used: a killed run never pays twice."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tongwen.core.artifact import check_disk
from tongwen.core.journal import Journal

MIN_FREE_BYTES = 64 << 20  # free disk space below which no request is sent


@dataclass(frozen=True)
class Reply:
    """A reply of the endpoint. key: of the request; finish: the finish reason; tokens: of prompt and answer."""

    key: str
    text: str
    finish: str
    tokens: tuple[int, int]


class ReplyJournal(Journal):
    """The replies by key."""

    def __init__(self, file: Path) -> None:
        self.replies: dict[str, Reply] = {}
        super().__init__(file, durable=True)

    def load(self, entry: Any) -> None:
        asked, answered = map(int, entry["tokens"])
        key, text, finish = (str(entry[name]) for name in ("key", "text", "finish"))
        self.replies[key] = Reply(key, text, finish, (asked, answered))

    def check_disk_space(self) -> None:
        """Raise MachineError when the disk may have no space for the next reply."""
        check_disk(self.file.parent, MIN_FREE_BYTES)

    def add(self, reply: Reply) -> None:
        """Add a reply and sync it to disk."""
        self.append(asdict(reply))
        self.replies[reply.key] = reply
