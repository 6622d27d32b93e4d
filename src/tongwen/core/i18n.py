"""The user's language. The code holds the English texts, `locale/` their Chinese translations (`make messages`).

`TONGWEN_LANG=en|zh` decides; without it the locale does. A page that is open in both says which it speaks. A text is
translated when it is shown, never when its module is imported, since one process may speak both languages. Readers of
Traditional Chinese get the Simplified texts; a catalogue `zh_TW` could be made from these by OpenCC (`s2twp`).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gettext import GNUTranslations

LOCALE = Path(__file__).parent / "locale"
_LANGUAGE: ContextVar[str] = ContextVar("language", default="")


def _(text: str) -> str:
    """The text in the user's language. A text with {placeholders} is formatted after it was translated:
    `_("{count} rows are lost").format(count=lost)`."""
    # gettext answers the empty text with the catalogue's header.
    return _chinese().gettext(text) if text and language() == "zh" else text


def N_(text: str) -> str:  # noqa: N802 (gettext's own name)
    """Mark a text for the catalogue inside a table; `_` translates it where it is shown."""
    return text


def language() -> str:
    """'zh' or 'en': what is being spoken, else TONGWEN_LANG, else the locale's environment variables."""
    chosen = os.environ.get("TONGWEN_LANG", "")
    for value in (_LANGUAGE.get(), chosen, *(os.environ.get(name, "") for name in ("LC_ALL", "LC_MESSAGES", "LANG"))):
        if value:
            return "zh" if value.lower().startswith("zh") else "en"
    return "en"


@contextmanager
def use_language(name: str) -> Iterator[None]:
    """Speak this language inside of the block, whatever the process speaks."""
    before = _LANGUAGE.set(name)
    try:
        yield
    finally:
        _LANGUAGE.reset(before)


@cache
def _chinese() -> GNUTranslations:
    from gettext import translation  # here: an English user's start needs no catalogue

    return translation("tongwen", LOCALE, ["zh_CN"])
