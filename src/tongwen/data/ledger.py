"""The ledger: rows and bytes in = kept + every loss by its reason. Code refuses to go on when it does not add up."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Ledger:
    """Two columns, counted apart: things (rows, samples) and their size (UTF-8 bytes, tokens)."""

    unit: str
    size_unit: str
    things_in: int = 0
    size_in: int = 0
    kept: int = 0
    size_kept: int = 0
    lost: Counter[str] = field(default_factory=Counter)
    size_lost: Counter[str] = field(default_factory=Counter)

    def enter(self, size: int, things: int = 1) -> None:
        self.things_in += things
        self.size_in += size

    def keep(self, size: int, things: int = 1) -> None:
        self.kept += things
        self.size_kept += size

    def lose(self, reason: str, size: int, things: int = 1) -> None:
        self.lost[reason] += things
        self.size_lost[reason] += size

    def check(self) -> None:
        """Raise AssertionError when the columns do not add up: a bug of ours, never the user's."""
        things, sizes = self.kept + self.lost.total(), self.size_kept + self.size_lost.total()
        if (things, sizes) != (self.things_in, self.size_in):
            raise AssertionError(
                f"the ledger does not add up: {self.things_in} {self.unit} in, {things} accounted for; "
                f"{self.size_in} {self.size_unit} in, {sizes} accounted for"
            )

    def to_dict(self) -> dict[str, Any]:
        self.check()
        return {
            "in": {self.unit: self.things_in, self.size_unit: self.size_in},
            "kept": {self.unit: self.kept, self.size_unit: self.size_kept},
            "lost": {
                reason: {self.unit: self.lost[reason], self.size_unit: self.size_lost[reason]}
                for reason in sorted(self.lost)
            },
        }
