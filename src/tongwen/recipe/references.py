"""What a recipe names outside of itself: files, models, other machines, as its settings declare (`names=`)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tongwen.recipe.fields import Names, Section


@dataclass(frozen=True)
class Reference:
    """A string of a recipe. key: its place, such as `prepare.documents.0.path`; kind: what it names."""

    key: str
    kind: Names
    value: str

    @property
    def is_read(self) -> bool:
        """Whether a run reads this as a file, a folder or a model."""
        return self.kind in ("file", "model") or (self.kind == "name or file" and Path(self.value).is_file())


def references(section: Section, place: str = "") -> Iterator[Reference]:
    """Yield each string that names something, in the order of the settings."""
    for name, field in type(section).model_fields.items():
        kind: Names = dict(field.json_schema_extra or {})["names"]  # type: ignore[arg-type, assignment]
        yield from _inside(getattr(section, name), kind, f"{place}{name}")


def _inside(value: Any, kind: Names, key: str) -> Iterator[Reference]:
    if isinstance(value, Section):
        yield from references(value, f"{key}.")
    elif isinstance(value, (list, dict)):
        for place, one in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _inside(one, kind, f"{key}.{place}")
    elif isinstance(value, str) and value and kind:
        yield Reference(key, kind, value)
