"""Checks of the texts and values inside a row: blank, not encodable, not JSON."""

from __future__ import annotations

import json
import re
from typing import Any

from tongwen.core.errors import RowRejected
from tongwen.core.i18n import _
from tongwen.data.row import kind

_VISIBLE = re.compile("[^\\s\xad\u115f\u1160\u200b-\u200f\u2028-\u202e\u2060-\u206f\u2800\u3164\ufe00-\ufe0f\ufeff]")


def is_blank(text: str) -> bool:
    """Whether a text has only invisible characters: blanks, zero-width characters and direction marks."""
    first = text[:1]  # nearly always enough
    return not ("!" <= first <= "~" or "\u4e00" <= first <= "\u9fff") and _VISIBLE.search(text) is None


def check_text(text: str, place: str | int) -> str:
    """Return a text without surrogates and NUL, else raise RowRejected. place: its key, or the number of its turn."""
    broken = False
    try:
        text.encode()
    except UnicodeEncodeError:
        broken = True
    if broken or "\0" in text:
        key = _("turn {place}").format(place=place) if isinstance(place, int) else place
        if broken:
            raise RowRejected("lone_surrogate", _("{key} contains an unpaired surrogate").format(key=key))
        raise RowRejected("nul_character", _("{key} contains a NUL character").format(key=key))
    return text


def check_data(value: Any, key: str) -> None:
    """Raise RowRejected for tools or arguments that are not valid JSON: lone surrogates, NaN or infinity."""
    if not value:
        return
    try:
        check_text(json.dumps(value, ensure_ascii=False, allow_nan=False), key)
    except (ValueError, RecursionError) as error:
        raise RowRejected("not_a_number", f"{key}: {error}") from None


def parse_inside(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RowRejected(
            "bad_json_inside", _("{where} is not JSON: {error}").format(where=where, error=error)
        ) from None


def keys_of(row: Any) -> str:
    return ", ".join(map(str, row)) if isinstance(row, dict) else kind(row)


def as_yaml(name: str) -> str:
    """Return a name as it may stand inside `{…}` of a recipe: quoted where YAML would take it apart."""
    return name if re.fullmatch(r"\w[\w .-]*(?<! )", name) else json.dumps(name, ensure_ascii=False)


def double_encoded(key: str) -> RowRejected:
    return RowRejected(
        "double_encoded",
        _("{key} contains JSON that was encoded again as text").format(key=key),
    )
