"""The tables of old programs (tables/*.yaml): for each flag where it stands today, or why it is gone.

Data as data: a flag is a row, its reason stands beside it in both languages, and the code knows no flag by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from typing import Any

import yaml

from tongwen.core.i18n import say

Text = tuple[str, str]  # English, Chinese


@dataclass(frozen=True)
class FlagRule:
    """What becomes of a flag.

    to:      dotted word of the recipe (`@` is the program's section), or option of a command; empty: nowhere
    read:    name of the reader of its value (see reading.py)
    words:   old value -> new value
    sets:    words of the recipe that it stands for
    mended:  why the new value means something else; dropped: why it is gone
    unless, needs: other flags whose presence, or absence, drops it, with the reason
    """

    to: str = ""
    read: str = "plain"
    words: Mapping[Any, Any] = field(default_factory=dict)
    sets: Mapping[str, Any] = field(default_factory=dict)
    mended: Text | None = None
    dropped: Text | None = None
    unless: Mapping[str, Text] = field(default_factory=dict)
    needs: Mapping[str, Text] = field(default_factory=dict)


@dataclass(frozen=True)
class OldProgram:
    """One program or file of an older project.

    names: of the script; keys: by which a file is recognised; signs, sign_values: flags, and parts of values, by which it is told
    from another of its name; positional: names for its words without a flag. section: of the recipe that it becomes; command, lines: or the tongwen command that does it
    defaults: values that it took when nothing was said; always: what it did without being asked
    """

    id: str
    project: str
    names: tuple[str, ...] = ()
    keys: tuple[str, ...] = ()
    signs: tuple[str, ...] = ()
    sign_values: tuple[str, ...] = ()
    positional: tuple[str, ...] = ()
    section: str = ""
    command: tuple[str, ...] = ()
    after: tuple[str, ...] = ()
    lines: tuple[tuple[str, ...], ...] = ()
    instead: tuple[str, ...] = ()
    holds: str = ""
    read: str = ""
    reason: Text | None = None
    note: Text | None = None
    defaults: Mapping[str, Any] = field(default_factory=dict)
    always: Mapping[str, Any] = field(default_factory=dict)
    flags: Mapping[str, FlagRule] = field(default_factory=dict)
    prefixes: Mapping[str, FlagRule] = field(default_factory=dict)
    finds_base: bool = False  # the base is named by the adapter
    trains: bool = False  # takes all of transformers' TrainingArguments


def spoken(text: Text | None) -> str:
    return say(*text) if text else ""


@cache
def programs(table: str) -> dict[str, OldProgram]:
    """The programs of one table, in its order."""
    rows = _read(table)
    shared = rows if table == "trainer" else _read("trainer") | rows
    return {id_: _program(id_, row, shared) for id_, row in rows.items()}


@cache
def scripts() -> tuple[OldProgram, ...]:
    return tuple(one for table in ("belle", "guanaco", "cla", "llamafactory") for one in programs(table).values())


@cache
def known_files() -> dict[str, dict[str, Any]]:
    """Files that the projects shipped, by name."""
    return _read("known")


def _read(table: str) -> dict[str, Any]:
    text = (resources.files("tongwen.migrate") / "tables" / f"{table}.yaml").read_text(encoding="utf-8")
    return dict(yaml.safe_load(text))


def _program(id_: str, row: dict[str, Any], shared: Mapping[str, Any]) -> OldProgram:
    used = row.get("uses", ())
    flags: dict[str, Any] = {}
    for name in reversed(used):
        flags |= shared[name]["flags"]
    known = {key: value for key, value in row.items() if key not in ("uses", "flags", "prefixes")}
    for key in ("names", "keys", "signs", "sign_values", "positional", "command", "after", "instead", "reason", "note"):
        if key in known:
            known[key] = tuple(known[key])
    known["lines"] = tuple(tuple(line) for line in known.get("lines", ()))
    return OldProgram(
        id=id_,
        flags={name: _rule(value) for name, value in {**flags, **row.get("flags", {})}.items()},
        prefixes={name: _rule(value) for name, value in row.get("prefixes", {}).items()},
        trains="trainer" in used,
        **known,
    )


def _rule(row: Any) -> FlagRule:
    """A word is where it goes, a pair of sentences is why it is gone, anything else says both."""
    if isinstance(row, str):
        return FlagRule(to=row)
    if isinstance(row, list):
        return FlagRule(dropped=(row[0], row[1]))
    row = dict(row)
    for key in ("mended", "dropped"):
        if key in row:
            row[key] = tuple(row[key])
    return FlagRule(**row)
