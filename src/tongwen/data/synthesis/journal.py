"""Answers that were paid for, one JSON line each, on the disk before they are used: what is killed never pays twice."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tongwen.core.artifact import check_disk
from tongwen.core.journal import Journal

MIN_FREE_BYTES = 64 << 20  # bytes of disk without which nothing more is asked


@dataclass(frozen=True)
class Reply:
    """What an endpoint answered. key: names the request; finish: why it ended; tokens: of prompt and answer."""

    key: str
    text: str
    finish: str
    tokens: tuple[int, int]


class ReplyJournal(Journal):
    """The replies by their keys."""

    def __init__(self, file: Path) -> None:
        self.replies: dict[str, Reply] = {}
        super().__init__(file, durable=True)

    def load(self, entry: Any) -> None:
        self.replies[entry["key"]] = Reply(**{**entry, "tokens": tuple(entry["tokens"])})

    def check_disk_space(self) -> None:
        """Raise MachineError when what is asked next might find no place."""
        check_disk(self.file.parent, MIN_FREE_BYTES)

    def add(self, reply: Reply) -> None:
        """Keep a reply: it is on the disk when this returns."""
        self.append(asdict(reply))
        self.replies[reply.key] = reply
