"""The objects of a row, read by name. A key that no reader asked for is known as unread, so that nothing is ignored silently."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Any

from tongwen.core.errors import RowRejected
from tongwen.core.i18n import _
from tongwen.recipe.data import SourceConfig


class Fields:
    """One object of a row: its values under our names.

    place: where it is in the row, such as `messages.`; ahead of the names of its unread keys.
    """

    __slots__ = ("_asked", "_columns", "_parts", "_taken", "place", "shape", "source", "values")

    def __init__(
        self, values: dict[str, Any], source: SourceConfig, place: str = "", with_columns: bool = True
    ) -> None:
        self.values, self.source, self.place = values, source, place
        if source.ignore:
            self.values = {key: value for key, value in values.items() if f"{place}{key}" not in source.ignore}
        self.shape = tuple(self.values)
        self._columns = source.columns if with_columns else {}
        self._taken = set(self._columns.values())
        self._asked: set[str] = set()
        self._parts: list[Fields] = []

    def key(self, name: str) -> str | None:
        """Return the object's own key for one of our names; None when it has none. A mapped column has only that name."""
        if not self._columns:
            return name if name in self.values else None
        theirs = self._columns.get(name)
        if theirs is None:
            theirs = name if name not in self._taken else None
        return theirs if theirs in self.values else None

    def has(self, *names: str) -> bool:
        """Whether one of the names is there, without reading it."""
        if not self._columns:
            return bool(_present(self.shape, names))
        return any(self.key(name) is not None for name in names)

    def get(self, *names: str) -> Any:
        """Return the value under one of the names, which all mean the same; None when there is none.

        Raises RowRejected when two of them have different contents.
        """
        if self._columns:
            keys = tuple(key for name in names if (key := self.key(name)) is not None)
        else:
            keys = _present(self.shape, names)
        if not keys:
            return None
        if len(keys) == 1:
            key = keys[0]
            self._asked.add(key)
            return self.values[key]
        self._asked.update(keys)
        filled = [key for key in keys if not is_empty(self.values[key])]
        for other in filled[1:]:
            if self.values[other] != self.values[filled[0]]:
                raise RowRejected(
                    "ambiguous",
                    _("{one} and {other} mean the same, but differ").format(
                        one=self.place + filled[0], other=self.place + other
                    ),
                )
        if filled:
            return self.values[filled[0]]
        return next((self.values[key] for key in keys if self.values[key] is not None), None)

    def leave(self, *names: str) -> None:
        """Count what was read under these names as unread: the reader could not use it."""
        self._asked.difference_update(key for name in names if (key := self.key(name)) is not None)

    def inside(self, values: dict[str, Any], place: str, with_columns: bool = False) -> Fields:
        """Return an object inside this one. Its unread keys count as the row's. with_columns: the recipe's names of columns
        are its names, too: those of a row and of its turns, but not of a call."""
        part = Fields(values, self.source, f"{self.place}{place}.", with_columns)
        self._parts.append(part)
        return part

    def unread(self) -> tuple[str, ...]:
        """Return the names of all keys with a content that nothing has read, here and inside."""
        return tuple(dict.fromkeys(self._unread()))

    def _unread(self) -> Iterator[str]:
        for key, value in self.values.items() if len(self._asked) < len(self.values) else ():
            if key not in self._asked and not is_empty(value):
                yield f"{self.place}{key}"
        for part in self._parts:
            yield from part._unread()


@lru_cache(maxsize=4096)
def _present(shape: tuple[str, ...], names: tuple[str, ...]) -> tuple[str, ...]:
    """Return those of the names that an object with these keys has. Most rows of a file have the same keys."""
    return tuple(name for name in names if name in shape)


def is_empty(value: Any) -> bool:
    """Whether a value has no content: null, or an empty text, list or object. Tables pad rows with these."""
    return value is None or value == "" or value == [] or value == {}
