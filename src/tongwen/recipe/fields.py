"""Building blocks of a recipe's sections: settings with help, rules between settings, and types of values."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer, model_validator
from pydantic_core import PydanticCustomError

from tongwen.core.i18n import _

# (broken, message) pairs: if `broken` is true, the section is refused with the message.
Rules = Iterator[tuple[object, str]]
SectionType = TypeVar("SectionType", bound="Section")


# What the strings of a setting name: nothing; a file, folder or glob; a model; a name, or a file when it has a suffix or a
# folder; another machine, or a secret for it; arguments of another library.
Names = Literal["", "file", "model", "name or file", "address", "arguments"]


def setting(default: Any, help_: str, *, free: bool = False, names: Names = "", **limits: Any) -> Any:
    """A field with its help.

    Args:
        default: `...` makes the setting required.
        help_: English; it is translated where it is shown.
        free: The setting does not decide the result, so it may change in an interrupted run, and after the run.
        names: What its strings name: see `Names`. A test asks for it at each setting that holds any string.
        limits: Limits of the value, as pydantic's `Field` takes them.
    """
    return Field(default, description=help_, json_schema_extra={"free": free, "names": names}, **limits)


def problem(message: str) -> PydanticCustomError:
    """Return the exception for a refused value. The message is already in the user's language."""
    # Without a context, pydantic takes the template as it is, braces included.
    return PydanticCustomError("tongwen", message)


class Section(BaseModel):
    """A section of a recipe: its settings, and the rules between them. Frozen after reading."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    def rules(self) -> Rules:
        """Yield the rules between this section's settings, in the order in which they are checked."""
        yield from ()

    @model_validator(mode="after")
    def _refuse_broken_rule(self: SectionType) -> SectionType:
        for broken, message in self.rules():
            if broken:
                raise problem(message)
        return self


# The longest training that a recipe can mean: more is a slip of the pen, or infinity.
LONGEST = {"epochs": 1e6, "steps": 1e9, "tokens": 1e15}


class Duration(BaseModel):
    """How long to train: `2 epochs`, `300 steps`, `5000000 tokens`."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    count: float
    unit: Literal["epochs", "steps", "tokens"]

    def __str__(self) -> str:
        number = int(self.count) if self.count == int(self.count) else self.count
        return f"{number} {self.unit[:-1] if number == 1 else self.unit}"


def read_duration(value: Any) -> Any:
    if isinstance(value, Duration):
        return value
    found = re.fullmatch(r"\s*([\d_.,]*\d[\d_.,]*(?:e\d+)?)\s*(epochs?|steps?|tokens?)\s*", str(value))
    try:
        count = float(found[1].replace("_", "").replace(",", "")) if found else 0.0
    except ValueError:
        count = 0.0
    unit = found[2].rstrip("s") + "s" if found else ""
    if not 0 < count <= LONGEST.get(unit, 0):
        raise problem(
            _(
                "{value!r} is not a training length; write for example `2 epochs`, `300 steps` or `5000000 tokens`"
            ).format(value=value)
        )
    return Duration(count=count, unit=unit)


def read_source(value: Any) -> Any:
    """Accept a path alone as a source."""
    return {"path": value} if isinstance(value, str) else value


def read_list(value: Any) -> Any:
    """Accept a single entry as a list with one element."""
    return [value] if isinstance(value, (str, dict)) else value


def read_number(value: Any) -> Any:
    """Accept a whole number as a float, but not a boolean."""
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value


def read_share_or_count(value: Any) -> Any:
    """Accept a share below 1 or a whole number. 1.0 could mean either."""
    if isinstance(value, float) and value >= 1 and (value == 1 or not value.is_integer()):
        raise problem(
            _("{value} is neither a share (below 1) nor a whole number; 1 means one, not all").format(value=value)
        )
    return read_number(value)


UNITS = {"minute": 60, "hour": 3600, "day": 86400}
TEN_YEARS = 3650 * 86400


def read_seconds(value: Any) -> Any:
    """Read `90 minutes`, `6 hours` or `2 days` as seconds."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(minute|hour|day)s?\s*", str(value))
    if not found or not 0 < float(found[1]) * UNITS[found[2]] <= TEN_YEARS:
        raise problem(
            _("{value!r} is not a time; write for example `90 minutes`, `6 hours` or `2 days`").format(value=value)
        )
    return float(found[1]) * UNITS[found[2]]


def _at_most(limit: float) -> BeforeValidator:
    """Refuse larger numbers, which overflow somewhere in a run. (`Field(le=...)` here would replace a field's own limits.)"""

    def check(value: Any) -> Any:
        if isinstance(value, (int, float)) and value > limit:
            raise problem(_("{value} is out of range; at most {limit:g}").format(value=f"{value}"[:40], limit=limit))
        return value

    return BeforeValidator(check)


Count = Annotated[int, _at_most(2**31 - 1)]
Number = Annotated[float, BeforeValidator(read_number), _at_most(1e12)]
ShareOrCount = Annotated[
    float,
    BeforeValidator(read_share_or_count),
    _at_most(2**31 - 1),
    Field(ge=0),
    PlainSerializer(lambda value: 1 if value == 1 else value),
]
Seconds = Annotated[float, BeforeValidator(read_seconds), PlainSerializer(lambda value: f"{value / 60:g} minutes")]
Length = Annotated[Duration, BeforeValidator(read_duration), PlainSerializer(str)]
