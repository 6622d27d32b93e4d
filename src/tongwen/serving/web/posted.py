"""What a request may post, whichever toolkit draws the page.

A toolkit may open a file, fetch an address or build a part of its own as soon as a request names one, before any handler is
called. So each posted object is looked at first: a file is one of the uploads, and a part is text.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tongwen.core.allowed_paths import resolve_inside
from tongwen.core.errors import RecipeError

DEPTH = 50  # of nested values
PARTS = frozenset({"component", "constructor_args"})  # Gradio builds what they describe


def problem_of(body: bytes, uploads: Path | None, origin: str) -> str:
    """Return what is wrong with the body of a request, or an empty string.

    uploads: the folder of uploaded files, without links; origin: the page's own, where uploaded files have their addresses.
    """
    try:
        levels: list[Any] = [json.loads(body)] if body else []
    except (ValueError, RecursionError):
        return "this is not JSON"
    for _depth in range(DEPTH):
        objects = [one for one in levels if isinstance(one, dict)]
        for one in objects:
            if not PARTS.isdisjoint(one):
                return "a message holds text only"
            if not _is_upload(one.get("path"), uploads) or not _is_ours(one.get("url"), origin):
                return "this is no uploaded file"
        levels = [
            inner
            for one in levels
            if isinstance(one, (dict, list))
            for inner in (one.values() if isinstance(one, dict) else one)
        ]
        if not levels:
            return ""
    return "this is nested too deeply"


def _is_upload(path: Any, uploads: Path | None) -> bool:
    if path is None:
        return True
    try:
        return resolve_inside((uploads,) if uploads else (), path).is_file()
    except RecipeError:
        return False


def _is_ours(url: Any, origin: str) -> bool:
    return url is None or (isinstance(url, str) and url.startswith(f"{origin}/"))
