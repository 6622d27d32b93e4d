"""Control tokens in a row's or a user's own text: found, refused, or separated so that they stay text."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any

from tongwen.core.errors import RowRejected
from tongwen.core.i18n import _
from tongwen.core.message_layout import read_arguments
from tongwen.core.template_cache import SENTINEL
from tongwen.core.template_environment import LEARN_FROM, LEARN_TO

# Separates the characters of a control token in a user's text: the encoder tokenises the parts separately.
APART = "\ufdd3"


@lru_cache(maxsize=16)
def forbidden_in_text(special: tuple[str, ...]) -> tuple[str, re.Pattern[str]]:
    """Return (first characters, pattern) of the tokens and marks that no row's text may contain, the longest first."""
    tokens = sorted(filter(None, special), key=len, reverse=True)
    marks = f"{LEARN_FROM}{LEARN_TO}{SENTINEL}{APART}"
    firsts = "".join(sorted({token[0] for token in tokens})) + marks
    return firsts, re.compile("|".join([f"[{marks}]", *map(re.escape, tokens)]))


def separate_control_tokens(text: str, special: tuple[str, ...]) -> str:
    """Put APART inside every control token, so that it becomes ordinary tokens: a user's text can neither end nor open
    a turn. Raises RowRejected for a noncharacter, and for a control token of one character."""

    def separate(found: re.Match[str]) -> str:
        if len(found[0]) == 1:
            raise RowRejected("noncharacter_in_text", _("the text contains {found!r}").format(found=found[0]))
        return APART.join(found[0])

    return forbidden_in_text(special)[1].sub(separate, text)


def separate_in_values(value: Any, special: tuple[str, ...]) -> Any:
    """Return a message or a tool with the control tokens in its texts separated, also in the arguments of calls."""
    if isinstance(value, str):
        return separate_control_tokens(value, special)
    if isinstance(value, (list, tuple)):
        return [separate_in_values(one, special) for one in value]
    if isinstance(value, dict):
        return {
            separate_in_values(key, special): separate_in_values(
                read_arguments(one) if key == "arguments" else one, special
            )
            for key, one in value.items()
        }
    return value
