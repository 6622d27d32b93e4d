"""Translate messages. The code contains the English texts, `locale/` their Chinese translations (`make messages`).

`TONGWEN_LANG=en|zh` sets the language; without it the locale does. A web page sets its own language. A text is translated
when it is shown, never when its module is imported, since one process may use both languages. Readers of Traditional
Chinese get the Simplified texts; OpenCC (`s2twp`) could make a catalogue `zh_TW` from these.
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
    """Return the text in the user's language. Format {placeholders} after the translation:
    `_("{count} rows are lost").format(count=lost)`."""
    # For the empty text, gettext returns the catalogue's header.
    return _chinese().gettext(text) if text and language() == "zh" else text


def ngettext(one: str, many: str, count: int) -> str:
    """Return the text for this number of things in the user's language; Chinese has one form for all numbers."""
    return _(one if count == 1 else many)


def N_(text: str) -> str:  # noqa: N802 (gettext's own name)
    """Mark a text for the catalogue inside a table; `_` translates it where it is shown."""
    return text


def language() -> str:
    """Return 'zh' or 'en': the language of `use_language`, else TONGWEN_LANG, else the locale's environment variables."""
    chosen = os.environ.get("TONGWEN_LANG", "")
    for value in (_LANGUAGE.get(), chosen, *(os.environ.get(name, "") for name in ("LC_ALL", "LC_MESSAGES", "LANG"))):
        if value:
            return "zh" if value.lower().startswith("zh") else "en"
    return "en"


@contextmanager
def use_language(name: str) -> Iterator[None]:
    """Use this language inside the block."""
    before = _LANGUAGE.set(name)
    try:
        yield
    finally:
        _LANGUAGE.reset(before)


@cache
def _chinese() -> GNUTranslations:
    from gettext import translation  # imported late: English users need no catalogue

    return translation("tongwen", LOCALE, ["zh_CN"])
