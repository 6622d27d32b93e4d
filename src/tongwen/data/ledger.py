"""The ledger counts rows and bytes: in = kept + losses by reason. `check` raises when the sums differ."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from tongwen.core.i18n import _
from tongwen.core.records import Origin


@dataclass
class Ledger:
    """Two separate counts: items (rows, samples) and their size (UTF-8 bytes, tokens)."""

    unit: str
    size_unit: str
    items_in: int = 0
    size_in: int = 0
    kept: int = 0
    size_kept: int = 0
    lost: Counter[str] = field(default_factory=Counter)
    size_lost: Counter[str] = field(default_factory=Counter)

    def enter(self, size: int, items: int = 1) -> None:
        self.items_in += items
        self.size_in += size

    def keep(self, size: int, items: int = 1) -> None:
        self.kept += items
        self.size_kept += size

    def lose(self, reason: str, size: int, items: int = 1) -> None:
        self.lost[reason] += items
        self.size_lost[reason] += size

    def move(self, reason: str, size: int) -> None:
        """Move one kept row to the losses."""
        self.keep(-size, items=-1)
        self.lose(reason, size)

    def add(self, other: Ledger) -> None:
        self.enter(other.size_in, other.items_in)
        self.keep(other.size_kept, other.kept)
        for reason, items in other.lost.items():
            self.lose(reason, other.size_lost[reason], items)

    @classmethod
    def from_dict(cls, table: dict[str, Any]) -> Ledger:
        """Return the ledger from the output of `to_dict`."""
        unit, size_unit = table["in"]
        out = cls(unit, size_unit)
        out.enter(table["in"][size_unit], table["in"][unit])
        out.keep(table["kept"][size_unit], table["kept"][unit])
        for reason, lost in table["lost"].items():
            out.lose(reason, lost[size_unit], lost[unit])
        return out

    def check(self) -> None:
        """Raise AssertionError when the counts do not add up: that is a bug in tongwen, never the user's error."""
        items, sizes = self.kept + self.lost.total(), self.size_kept + self.size_lost.total()
        if (items, sizes) != (self.items_in, self.size_in):
            raise AssertionError(
                f"the ledger does not add up: {self.items_in} {self.unit} in, {items} accounted for; "
                f"{self.size_in} {self.size_unit} in, {sizes} accounted for"
            )

    def to_dict(self) -> dict[str, Any]:
        self.check()
        return {
            "in": {self.unit: self.items_in, self.size_unit: self.size_in},
            "kept": {self.unit: self.kept, self.size_unit: self.size_kept},
            "lost": {
                reason: {self.unit: self.lost[reason], self.size_unit: self.size_lost[reason]}
                for reason in sorted(self.lost)
            },
        }


def table_rows(table: dict[str, Any], name: str, kept: str) -> list[tuple[str, int, int]]:
    """Return the lines of a ledger for a table: (label, items, size)."""
    unit, size_unit = table["in"]
    lines = [(f"{name}: {_('in')}", table["in"])]
    lines += [(f"  − {reason}", lost) for reason, lost in table["lost"].items()]
    lines.append((f"  = {kept}", table["kept"]))
    return [(label, count[unit], count[size_unit]) for label, count in lines]


@dataclass(frozen=True)
class RejectedRow:
    """A rejected row, as written to rejected.jsonl."""

    origin: Origin
    reason: str
    rule: str
    value: Any

    def to_line(self) -> bytes:
        found = {
            "file": self.origin.file,
            "row": self.origin.row,
            "reason": self.reason,
            "rule": self.rule,
            "value": self.value,
        }
        return json.dumps(found, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"
