"""Known failures of the older projects by number: symptom, cause, what tongwen does instead, the tests that prove it."""

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
    """A failure of an older project. handling: what tongwen does instead; tests: those that prove it."""

    id: str
    symptom: str
    cause: str
    handling: str
    tests: tuple[str, ...]


@cache
def failures() -> dict[str, KnownFailure]:
    """Return all failures by number."""
    text = (resources.files("tongwen.migrate") / "failures.yaml").read_text(encoding="utf-8")
    return {
        id_: KnownFailure(id_, row["says"], row["why"], row["here"], tuple(row["shown"]))
        for id_, row in read_table(text).items()
    }


def find(name: str) -> KnownFailure:
    """Return the failure with this number, in any spelling (F-02, f2). Raises RecipeError if there is none."""
    found = re.fullmatch(r"[Ff]-?0*(\d+)", name.strip())
    known_failures = failures()
    if found is None or (id_ := f"F-{int(found[1]):02}") not in known_failures:
        raise RecipeError(
            _("unknown failure number: {name!r}").format(name=name),
            place="tongwen doctor",
            remedy=_("{lowest} to {highest}; docs/from-older-projects.md lists them all").format(
                lowest=min(known_failures), highest=max(known_failures)
            ),
        )
    return known_failures[id_]
