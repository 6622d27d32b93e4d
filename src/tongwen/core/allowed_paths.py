"""Paths from elsewhere, such as a browser: one gate, which all of them pass before anything is opened."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tongwen.core.errors import RecipeError
from tongwen.core.i18n import _
from tongwen.core.terminal_text import visible

ADDRESS = re.compile(r"\w[\w+.-]+:")  # http:, file:, s3:, hub:; one letter is a drive of Windows
SHOWN = 200  # characters of a refused path


def resolve_inside(folders: Sequence[Path], name: Any) -> Path:
    """Return an absolute path without links, which need not exist. No later step can take it for an address, or for the name
    of a model on a hub.

    Raises RecipeError if it is outside the folders, hidden in them, an address, or no path at all. folders: without links.
    """
    try:
        if not isinstance(name, str) or name.startswith("~") or ADDRESS.match(name):
            raise ValueError
        path = Path(name).resolve()
        parts = next(path.relative_to(folder).parts for folder in folders if path.is_relative_to(folder))
        if any(part.startswith(".") for part in parts):
            raise ValueError
        path.stat()  # a name can be too long to be asked for
    except FileNotFoundError:
        return path
    except (OSError, ValueError, RuntimeError, StopIteration):
        raise RecipeError(
            _("this is outside the folders that the page may access"),
            place=visible(str(name)[:SHOWN]),
            remedy=" ".join(map(str, folders)),
        ) from None
    return path
