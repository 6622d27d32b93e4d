"""What a user may have meant by a name that does not exist."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from tongwen.core.i18n import _


def nearest_names(name: str, known: Iterable[str], most: int = 3, cutoff: float = 0.6) -> list[str]:
    """Return the known names most similar to a name, the nearest first. cutoff: similarity from which one is named."""
    from difflib import get_close_matches  # here, since most names are right

    return get_close_matches(name, list(known), most, cutoff)


def did_you_mean(near: Sequence[str]) -> str:
    """Return a remedy that lists names; empty if there are none."""
    return _("did you mean {nearest}?").format(nearest=" / ".join(f"`{name}`" for name in near)) if near else ""
