"""Failures of the older projects by their numbers: symptom, cause, what happens here instead, the tests that show it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from importlib import resources

from tongwen.core.errors import RecipeError
from tongwen.core.i18n import _
from tongwen.migrate.tables import read_table


@dataclass(frozen=True)
class KnownFailure:
    """handling: what happens instead in tongwen; tests: those that prove it."""

    id: str
    symptom: str
    cause: str
    handling: str
    tests: tuple[str, ...]


@cache
def failures() -> dict[str, KnownFailure]:
    """All of them, by number."""
    text = (resources.files("tongwen.migrate") / "failures.yaml").read_text(encoding="utf-8")
    return {
        id_: KnownFailure(id_, row["says"], row["why"], row["here"], tuple(row["shown"]))
        for id_, row in read_table(text).items()
    }


def find(name: str) -> KnownFailure:
    """The failure of that number, however it is written (F-02, f2). Raises RecipeError when there is none."""
    found = re.fullmatch(r"[Ff]-?0*(\d+)", name.strip())
    known_failures = failures()
    if found is None or (id_ := f"F-{int(found[1]):02}") not in known_failures:
        raise RecipeError(
            _("no failure has the number {name!r}").format(name=name),
            place="tongwen doctor",
            remedy=_("{lowest} to {highest}; docs/from-older-projects.md lists them all").format(
                lowest=min(known_failures), highest=max(known_failures)
            ),
        )
    return known_failures[id_]
