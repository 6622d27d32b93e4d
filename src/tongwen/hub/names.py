"""Resolve the name of a data set or model to an id on a hub: short names, old ids that have moved, page URLs.

Some ids of older projects no longer exist, and users should not have to search for their replacements. The table
(names.yaml) lists verified ids only.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any
from urllib.parse import urlsplit

from tongwen.core.errors import RecipeError
from tongwen.core.i18n import _

Notify = Callable[[str], None]


@dataclass(frozen=True)
class HubRef:
    """A repository on a hub. kind: `dataset`, `model`, or empty when the hub must be asked."""

    name: str  # as the user wrote it
    id: str  # OWNER/NAME
    kind: str = ""
    where: str = "hub"  # hub | modelscope
    revision: str = ""
    files: tuple[str, ...] = ()
    code: bool = False
    modelscope: str = ""  # its id on ModelScope, if the table lists one

    @property
    def source(self) -> str:
        return f"{self.where}:{self.id}"

    @property
    def tail(self) -> str:
        return self.id.split("/")[-1]


@cache
def names() -> dict[str, dict[str, Any]]:
    """Return the table of short names (names.yaml)."""
    import yaml

    text = resources.files("tongwen.hub").joinpath("names.yaml").read_text(encoding="utf-8")
    return dict(yaml.safe_load(text))


def resolve(name: str, notify: Notify, *, kind: str = "", revision: str = "") -> HubRef:
    """Resolve a short name, OWNER/NAME[@REVISION], `hub:…`, `modelscope:…` or the URL of a page.

    Raises RecipeError for an unknown name, with the three nearest ones.
    """
    text, where, kind = _without_address(name.strip(), kind)
    text, _unused, at = text.partition("@")
    key, old = _find_key(text)
    revision = revision or at
    if key is None:
        if not is_id(text):
            raise unknown(name, text)
        return HubRef(name, text, kind or ("model" if where == "modelscope" else ""), where, revision)
    entry = names()[key]
    modelscope_id = entry.get("modelscope", "")
    id_ = entry["hub"] if where == "hub" else modelscope_id or (text if "/" in text and not old else "")
    if not id_:
        raise RecipeError(
            _("the ModelScope location of {key} is unknown").format(key=key),
            place=name,
            remedy="modelscope:OWNER/NAME",
        )
    if old:
        notify(_("{text} has moved: fetching {id} instead").format(text=text, id=id_))
    return HubRef(
        name, id_, kind or entry["kind"], where, revision, tuple(entry.get("files", ())), modelscope=modelscope_id
    )


def is_id(text: str) -> bool:
    """Whether a text has the form OWNER/NAME."""
    return bool(re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", text, re.ASCII)) and ".." not in text


def current_id(text: str) -> str:
    """Return the hub id of a short name or of an id that has moved; any other text unchanged."""
    key, _unused = _find_key(text)
    return str(names()[key]["hub"]) if key is not None else text


def nearest(text: str) -> list[str]:
    """Return the three short names most similar to a text."""
    wanted = text.lower().split("/")[-1]
    rank = {
        key: max(
            difflib.SequenceMatcher(None, wanted, candidate.lower().split("/")[-1]).ratio()
            for candidate in _all_names(key)
        )
        for key in names()
    }
    return sorted(rank, key=lambda key: (-rank[key], key))[:3]


def _all_names(key: str) -> list[str]:
    entry = names()[key]
    return [key, entry["hub"], *entry.get("also", ()), *entry.get("moved_from", ()), entry.get("modelscope") or key]


def _find_key(text: str) -> tuple[str | None, bool]:
    """Return (key in the table or None, whether the text is an old id). Case is ignored, as on the hub."""
    for key in names():
        for candidate in _all_names(key):
            if candidate.lower() == text.lower():
                return key, candidate in names()[key].get("moved_from", ())
    return None, False


def _without_address(text: str, kind: str) -> tuple[str, str, str]:
    """Return (name, hub or modelscope, kind) of `hub:X`, `modelscope:X`, `https://HOST/datasets/X/tree/main`."""
    if text.startswith(("http://", "https://")):
        parts = urlsplit(text)
        where = "modelscope" if "modelscope" in (parts.hostname or "") else "hub"
        path = [part for part in parts.path.split("/") if part]
        if path[:1] in (["datasets"], ["models"]):
            kind = kind or path[0].removesuffix("s")
            path = path[1:]
        elif where == "hub":
            kind = kind or "model"
        return "/".join(path[:2]), where, kind
    for where in ("modelscope", "hub"):
        if text.startswith(f"{where}:"):
            return text.removeprefix(f"{where}:").strip(), where, kind
    return text, "hub", kind


def unknown(name: str, text: str) -> RecipeError:
    near = ", ".join(nearest(text))
    return RecipeError(
        _("{text!r} is not a known name").format(text=text),
        place=name or "tongwen fetch",
        remedy=_("{near}; or OWNER/NAME from the hub").format(near=near),
    )
