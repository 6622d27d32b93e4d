"""Failures of the older projects by their numbers: symptom, cause, what happens here instead, the tests that show it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from importlib import resources

import yaml

from tongwen.core.errors import RecipeError
from tongwen.core.i18n import say
from tongwen.migrate.tables import Text


@dataclass(frozen=True)
class KnownFailure:
    """says: what was seen; why: its cause; here: what happens instead; shown: tests."""

    id: str
    says: Text
    why: Text
    here: Text
    shown: tuple[str, ...]


@cache
def failures() -> dict[str, KnownFailure]:
    """All of them, by number."""
    text = (resources.files("tongwen.migrate") / "failures.yaml").read_text(encoding="utf-8")
    return {
        id_: KnownFailure(id_, **{key: tuple(value) for key, value in row.items()})
        for id_, row in yaml.safe_load(text).items()
    }


def find(name: str) -> KnownFailure:
    """The failure of that number, however it is written (F-02, f2). Raises RecipeError when there is none."""
    found = re.fullmatch(r"[Ff]-?0*(\d+)", name.strip())
    known = failures()
    if found is None or (id_ := f"F-{int(found[1]):02}") not in known:
        raise RecipeError(
            say(f"there is no failure {name!r}", f"没有编号 {name!r}"),
            place="tongwen doctor",
            remedy=say(
                f"{min(known)} to {max(known)}; docs/from-older-projects.md has them all",
                f"{min(known)} 至 {max(known)}；全部见 docs/from-older-projects_zh.md",
            ),
        )
    return known[id_]
