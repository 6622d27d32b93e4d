"""One row of a file, and a strict JSON parser that never changes the meaning of a row silently.

Python's parser accepts duplicate keys (the last wins), NaN and any depth. Other programs take the first key, reject NaN, and
crash on deep nesting.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

from tongwen.core.errors import RowRejected
from tongwen.core.i18n import N_, _

CAP = 1 << 24  # maximal bytes of a row
DEPTH = 32


@dataclass(frozen=True, slots=True)
class RawRow:
    """One unchanged row of a file; `problem` is set when it could not even be parsed."""

    file: str
    row: int
    value: Any
    size: int  # UTF-8 bytes of the row's text
    problem: str = ""
    reason: str = ""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) != len(pairs):
        keys = [key for key, _ in pairs]
        key = next(key for key in keys if keys.count(key) > 1)
        raise RowRejected("duplicate_key", _("the key {key!r} appears twice").format(key=key))
    return out


def _constant(name: str) -> Any:
    raise RowRejected("not_a_number", _("{name} is not JSON").format(name=name))


# The hook takes at most a third of the parsing time; counting keys afterwards takes more.
DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_constant)
# Finds the end of a value whose content DECODER refuses.
LENIENT = json.JSONDecoder(strict=False, parse_constant=lambda name: None, parse_int=lambda digits: 0)


def parse_json(text: str) -> dict[str, Any]:
    """Parse a line that holds one object. Raises RowRejected."""
    try:
        value = DECODER.decode(text)
    except RecursionError:
        raise too_deep() from None
    except ValueError as error:
        raise not_json(error, text) from None
    check_object(value, text)
    return value  # type: ignore[no-any-return]


def check_object(value: Any, text: str) -> None:
    """Raise RowRejected unless the value is an object of at most DEPTH levels. text: the JSON of the value."""
    if value.__class__ is not dict:
        rule = _("a row must be an object, this is {kind}").format(kind=kind(value))
        if isinstance(value, str) and value.lstrip().startswith("{"):
            rule += _(": JSON that was encoded again as text")
        raise RowRejected("not_an_object", rule)
    if text.count("[") + text.count("{") > DEPTH and is_deep(value):
        raise too_deep()


def is_deep(value: Any) -> bool:
    """Whether lists and objects are nested more than DEPTH times."""
    layer = [value]
    for _index in range(DEPTH):
        layer = [
            part
            for whole in layer
            for part in (whole.values() if isinstance(whole, dict) else whole)
            if isinstance(part, (dict, list))
        ]
        if not layer:
            return False
    return True


def too_deep() -> RowRejected:
    return RowRejected("too_deep", _("nested deeper than {depth} levels").format(depth=DEPTH))


def not_json(error: ValueError, text: str, start: int = 0) -> RowRejected:
    """Return the error for a text that is not JSON from `start` on, with a guess at the cause."""
    if not isinstance(error, json.JSONDecodeError):
        return RowRejected("not_json", _("not JSON: {error}").format(error=error))
    if error.msg.startswith("Invalid control character"):
        letter = text[error.pos : error.pos + 1]
        name = f"U+{ord(letter):04X}" if letter else ""
        rule = _("the unescaped control character {name} in a string").format(name=name)
        return RowRejected("nul_character" if letter == "\0" else "control_character", rule)
    place = _("at character {pos}").format(pos=error.pos - start + 1)
    guess = _guess(error, text[start:], error.pos - start)
    return RowRejected("not_json", _("not JSON: {msg} {place}{guess}").format(msg=error.msg, place=place, guess=guess))


def _guess(error: json.JSONDecodeError, text: str, place: int) -> str:
    if re.match(r"\s*[\[{]\s*'", text):
        return _("; written by Python's print, not by json.dumps?")
    if error.msg.startswith("Unterminated string") or place >= len(text.rstrip()):
        return _("; truncated?")
    if text.startswith(("//", "#", "/*"), place):
        return _("; JSON has no comments")
    if error.msg == "Extra data":
        return _("; two objects on one line?")
    if re.compile("None|True|False|nan").match(text, place):
        return _("; JSON writes null, true, false")
    if text[:place].rstrip().endswith(",") or text.startswith(",", place):
        return _("; an extra comma?")
    return ""


def kind(value: Any) -> str:
    """Return the JSON type of a value, for messages."""
    names = {
        dict: N_("an object"),
        list: N_("a list"),
        str: N_("text"),
        int: N_("a number"),
        float: N_("a number"),
        bool: N_("true or false"),
    }
    return "null" if value is None else _(names[type(value)])
