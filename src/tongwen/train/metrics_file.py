"""Read metrics.jsonl without importing torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def read_metrics(file: Path) -> list[dict[str, Any]]:
    """Return the lines of metrics.jsonl; skip a line that a crash cut short."""
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
