"""What the page says when something fails."""

from __future__ import annotations

import secrets
import sys
import traceback

from tongwen.core.errors import TongwenError
from tongwen.core.i18n import _


def explain(error: Exception) -> str:
    """Return the text for the user: our own messages as they are; for other errors a number, with details in the terminal."""
    if isinstance(error, TongwenError):
        return error.text()
    if "out of memory" in str(error).lower() or isinstance(error, MemoryError):
        return _("out of memory: shorten the conversation, generate fewer tokens, or use a smaller model")
    number = secrets.token_hex(3)
    print(f"[{number}]", *traceback.format_exception(error), file=sys.stderr)
    return _("internal error; the terminal has the details under {number}").format(number=number)
