"""Answers that were paid for, one JSON line each, on the disk before they are used: what is killed never pays twice.

A line that a kill cut in the middle is taken off when the journal is opened again; what it held is asked once more.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType

from tongwen.core.artifact import check_disk
from tongwen.core.errors import ArtifactError
from tongwen.core.i18n import _

FREE = 64 << 20  # bytes of disk without which nothing more is asked


@dataclass(frozen=True)
class Reply:
    """What an endpoint answered. key: names the request; finish: why it ended; tokens: of prompt and answer."""

    key: str
    text: str
    finish: str
    tokens: tuple[int, int]


class ReplyJournal:
    """The file, and the replies in it by their keys."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.replies: dict[str, Reply] = {}
        whole = 0
        lines = file.read_bytes().splitlines(keepends=True) if file.exists() else []
        for number, line in enumerate(lines, 1):
            try:
                reply = json.loads(line) if line.endswith(b"\n") else None
                if reply is not None:
                    self.replies[reply["key"]] = Reply(**{**reply, "tokens": tuple(reply["tokens"])})
            except (ValueError, KeyError, TypeError):
                reply = None
            if reply is None:
                if number < len(lines):
                    raise ArtifactError(
                        _("this line of the journal is damaged"),
                        place=f"{file}:{number}",
                        remedy=_("delete the line: its answer will be requested again"),
                    )
                break
            whole += len(line)
        self.stream = file.open("ab")
        self.stream.truncate(whole)

    def __enter__(self) -> ReplyJournal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stream.close()

    def check_room(self) -> None:
        """Raise MachineError when what is asked next might find no place."""
        check_disk(self.file.parent, FREE)

    def add(self, reply: Reply) -> None:
        """Keep a reply: it is on the disk when this returns."""
        line = json.dumps(asdict(reply), ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"
        self.stream.write(line)
        self.stream.flush()
        os.fsync(self.stream.fileno())
        self.replies[reply.key] = reply
