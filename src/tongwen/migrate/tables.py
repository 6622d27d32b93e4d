"""The tables of old programs (tables/*.yaml): for each flag where it stands today, or why it is gone.

Data as data: a flag is a row, its reason stands beside it, and the code knows no flag by name. The tag `!_` marks texts
for the catalogue: they are translated when they are shown.
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
    """A text for users: what the tag `!_` marks. `spoken` gives it in the user's language."""


class TableLoader(yaml.SafeLoader):
    """Reads tables whose texts are marked."""


def _read_text(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> Text:
    return Text(loader.construct_scalar(node))


TableLoader.add_constructor("!_", _read_text)


def read_table(text: str) -> Any:
    """The data of a table, with its texts as `Text`."""
    return TableLoader(text).get_single_data()


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
    mended: str | None = None
    dropped: str | None = None
    unless: Mapping[str, str] = field(default_factory=dict)
    needs: Mapping[str, str] = field(default_factory=dict)


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
    reason: str | None = None
    note: str | None = None
    defaults: Mapping[str, Any] = field(default_factory=dict)
    always: Mapping[str, Any] = field(default_factory=dict)
    flags: Mapping[str, FlagRule] = field(default_factory=dict)
    prefixes: Mapping[str, FlagRule] = field(default_factory=dict)
    finds_base: bool = False  # the base is named by the adapter
    trains: bool = False  # takes all of transformers' TrainingArguments


def translate(text: str | None) -> str:
    return _(text or "")


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
    """A word is where it goes, a text is why it is gone, anything else says both."""
    if isinstance(row, Text):
        return FlagRule(dropped=row)
    return FlagRule(to=row) if isinstance(row, str) else FlagRule(**row)
