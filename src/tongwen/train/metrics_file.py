"""What training has written to metrics.jsonl, for those who only read it: no torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def read_metrics(file: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl; a line that a crash cut short is left out."""
    if not file.is_file():
        return []
    out = []
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            read = json.loads(line)
        except ValueError:
            continue
        if isinstance(read, dict):
            out.append(read)
    return out
