"""What the page can do: callables that a stage hands it. Names of models, recipes and runs are strings of the stage's own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Messages = list[dict[str, Any]]
CONCURRENCY = 2  # questions that are answered at the same time


@dataclass(frozen=True)
class ChatBackend:
    """models: what can be opened; chosen: what stands there at first, one or two side by side. fit(model, messages, options):
    the messages that the model sees; reply: its answer to them in pieces; settings: how it answers at first, as `Sampling`
    names it."""

    models: Callable[[], list[str]]
    chosen: Sequence[str]
    fit: Callable[[str, Messages, dict[str, Any]], Messages]
    reply: Callable[[str, Messages, dict[str, Any]], Iterator[str]]
    system: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class DataBackend:
    """templates: names; inspect(file, model, template): what is in a file and its samples, as HTML; model may be empty."""

    models: Callable[[], list[str]]
    templates: Sequence[str]
    inspect: Callable[[Path, str, str], tuple[str, str]]


@dataclass(frozen=True)
class VocabularyBackend:
    """compare(base, other, text): the tokens of both as HTML, and the fertility report as a whole page; other may be empty."""

    models: Callable[[], list[str]]
    compare: Callable[[str, str, str], tuple[str, str]]


@dataclass(frozen=True)
class RunView:
    """A run as it is now. curves: (title, points, whether they scatter); log: its last lines; reports: (name, file)."""

    running: bool
    facts: Sequence[tuple[str, str]]
    curves: Sequence[tuple[str, list[tuple[float, float]], bool]]
    log: str
    samples: Sequence[dict[str, str]]
    reports: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class RunsBackend:
    """start(recipe, changes) gives the name of the run; stop asks a run to end, resume goes on with it; compare
    gives a page, report a file."""

    recipes: Callable[[], list[str]]
    read: Callable[[str], str]
    start: Callable[[str, str], str]
    runs: Callable[[], list[str]]
    picture: Callable[[str], RunView]
    stop: Callable[[str], None]
    resume: Callable[[str], None]
    compare: Callable[[Sequence[str]], str]
    report: Callable[[str], Path]


@dataclass(frozen=True)
class PageBackend:
    """A tab for each that is there."""

    title: str
    chat: ChatBackend
    data: DataBackend | None = None
    vocabulary: VocabularyBackend | None = None
    runs: RunsBackend | None = None
