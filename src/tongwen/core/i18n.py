"""Two languages side by side at the place where a sentence is said, so that neither can be changed without the other.

`TONGWEN_LANG=en|zh` decides; without it the locale does. A page that is open in both says which it speaks.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_SPOKEN: ContextVar[str] = ContextVar("spoken", default="")


def language() -> str:
    """'zh' or 'en': what is being spoken, else TONGWEN_LANG, else the locale's environment variables."""
    chosen = os.environ.get("TONGWEN_LANG", "")
    for value in (_SPOKEN.get(), chosen, *(os.environ.get(name, "") for name in ("LC_ALL", "LC_MESSAGES", "LANG"))):
        if value:
            return "zh" if value.lower().startswith("zh") else "en"
    return "en"


@contextmanager
def speaking(name: str) -> Iterator[None]:
    """Speak this language inside of the block, whatever the process speaks."""
    before = _SPOKEN.set(name)
    try:
        yield
    finally:
        _SPOKEN.reset(before)


def say(en: str, zh: str) -> str:
    """The sentence in the user's language."""
    return zh if language() == "zh" else en
