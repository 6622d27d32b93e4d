"""What a request to the page may post: one model for each route, without unknown fields."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from annotated_types import Ge, Le
from pydantic import BaseModel, ConfigDict, Field

MAX_TOKENS = 4096
NAME = 4096  # characters of a path
Name = Annotated[str, Field(max_length=NAME)]


class Posted(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class Turn(Posted):
    role: Literal["user", "assistant"]
    content: str


class SamplingSettings(Posted):
    max_new_tokens: int = Field(512, ge=1, le=MAX_TOKENS)
    temperature: float = Field(0.0, ge=0, le=2)
    top_p: float = Field(1.0, ge=0.05, le=1)
    top_k: int = Field(0, ge=0, le=200)
    repetition_penalty: float = Field(1.0, ge=1, le=2)
    seed: int | None = Field(None, ge=0, le=2**31 - 1)


def initial(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings with which the page begins: those that it shows, within the ranges of its sliders."""
    found = SamplingSettings().model_dump()
    for name, field in SamplingSettings.model_fields.items():
        value = settings.get(name, found[name])
        for limit in field.metadata if value is not None else ():
            if isinstance(limit, Ge):
                value = max(value, limit.ge)
            elif isinstance(limit, Le):
                value = min(value, limit.le)
        found[name] = value
    return found


class Question(Posted):
    model: Name
    system: str = ""
    messages: list[Turn]
    sampling: SamplingSettings


class Inspection(Posted):
    file: Name
    model: Name
    template: Name


class Comparison(Posted):
    base: Name
    other: Name
    text: str


class Start(Posted):
    recipe: Name
    changes: str


class OneRun(Posted):
    run: Name


class SeveralRuns(Posted):
    runs: list[Name]
