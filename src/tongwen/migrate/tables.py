"""Load the tables of old programs (tables/*.yaml), which give each flag's new key, or why it is gone.

Each flag is a row with its reason; the code mentions no flag by name. The tag `!_` marks texts for the message catalogue,
which are translated when they are shown.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from typing import Any

import yaml

from tongwen.core.i18n import _


class Text(str):
    """A text for users, marked with the tag `!_`; `translate` returns it in the user's language."""


class TableLoader(yaml.SafeLoader):
    """Reads tables with the tag `!_`."""


def _read_text(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> Text:
    return Text(loader.construct_scalar(node))


TableLoader.add_constructor("!_", _read_text)


def read_table(text: str) -> Any:
    """Return the data of a table; its marked texts are `Text`."""
    return TableLoader(text).get_single_data()


@dataclass(frozen=True)
class FlagRule:
    """The translation of one flag.

    to:      dotted key of the recipe (`@` is the program's section), or option of a command; empty: none
    read:    name of the reader of its value (see flag_values.py)
    words:   old value -> new value
    sets:    recipe keys and values that the flag implies
    mended:  why the value is changed; dropped: why the flag is gone
    unless, needs: other flags whose presence, or absence, makes it ineffective, with the reason
    """

    to: str = ""
    read: str = "plain"
    words: Mapping[Any, Any] = field(default_factory=dict)
    sets: Mapping[str, Any] = field(default_factory=dict)
    mended: str | None = None
    dropped: str | None = None
    unless: Mapping[str, str] = field(default_factory=dict)
    needs: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class OldProgram:
    """One program or file of an older project.

    names:  of the script; keys: identify a file
    signs, sign_values: flags, and parts of values, that distinguish it from other programs of the same name
    positional: names of its arguments without a flag
    section: of the recipe that replaces it; command, lines: or the tongwen command that does
    defaults: values of flags that were not given; always: settings that the program never let the user change
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
    reason: str | None = None
    note: str | None = None
    defaults: Mapping[str, Any] = field(default_factory=dict)
    always: Mapping[str, Any] = field(default_factory=dict)
    flags: Mapping[str, FlagRule] = field(default_factory=dict)
    prefixes: Mapping[str, FlagRule] = field(default_factory=dict)
    finds_base: bool = False  # the adapter names the base
    reads_file: bool = False  # its first argument may be its configuration, with key=value behind it
    trains: bool = False  # accepts all of transformers' TrainingArguments


def translate(text: str | None) -> str:
    return _(text or "")


@cache
def programs(table: str) -> dict[str, OldProgram]:
    """Return the programs of one table, in its order."""
    rows = _read(table)
    shared = rows if table == "trainer" else _read("trainer") | rows
    return {id_: _program(id_, row, shared) for id_, row in rows.items()}


@cache
def scripts() -> tuple[OldProgram, ...]:
    return tuple(one for table in ("belle", "guanaco", "cla", "llamafactory") for one in programs(table).values())


@cache
def known_files() -> dict[str, dict[str, Any]]:
    """Return the configuration files that the projects shipped, by name."""
    return _read("known")


def _read(table: str) -> dict[str, Any]:
    text = (resources.files("tongwen.migrate") / "tables" / f"{table}.yaml").read_text(encoding="utf-8")
    return dict(read_table(text))


def _program(id_: str, row: dict[str, Any], shared: Mapping[str, Any]) -> OldProgram:
    used = row.get("uses", ())
    flags: dict[str, Any] = {}
    for name in reversed(used):
        flags |= shared[name]["flags"]
    known = {key: value for key, value in row.items() if key not in ("uses", "flags", "prefixes")}
    for key in ("names", "keys", "signs", "sign_values", "positional", "command", "after", "instead"):
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
    """Return the rule of a row: a string is the new key, a `Text` is why the flag is gone, a mapping has the fields."""
    if isinstance(row, Text):
        return FlagRule(dropped=row)
    return FlagRule(to=row) if isinstance(row, str) else FlagRule(**row)
