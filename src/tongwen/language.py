"""Two languages side by side at the place where a sentence is said, so that neither can be changed without the other.

`TONGWEN_LANG=en|zh` decides; without it the locale does.
"""

from __future__ import annotations

import os


def language() -> str:
    """'zh' or 'en', from TONGWEN_LANG or else the locale's environment variables."""
    chosen = os.environ.get("TONGWEN_LANG", "")
    for value in (chosen, *(os.environ.get(name, "") for name in ("LC_ALL", "LC_MESSAGES", "LANG"))):
        if value:
            return "zh" if value.lower().startswith("zh") else "en"
    return "en"


def say(en: str, zh: str) -> str:
    """The sentence in the user's language."""
    return zh if language() == "zh" else en
