"""The callables behind the page. Models, recipes and runs are named by strings that only the caller interprets."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Messages = list[dict[str, Any]]
CONCURRENCY = 2  # questions that are answered at the same time


@dataclass(frozen=True)
class ChatBackend:
    """The chat tab.

    models:   returns the names of the models that can be opened
    chosen:   the models at the start, one or two side by side
    fit:      (model, messages, options) -> the messages that fit the model's context
    reply:    (model, messages, options) -> the answer in pieces
    settings: initial values of the sampling options, under the names of `Sampling`
    """

    models: Callable[[], list[str]]
    chosen: Sequence[str]
    fit: Callable[[str, Messages, dict[str, Any]], Messages]
    reply: Callable[[str, Messages, dict[str, Any]], Iterator[str]]
    system: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class DataBackend:
    """The data tab. inspect: (uploaded file, model or "", template) -> (report on the file, its samples), both HTML."""

    models: Callable[[], list[str]]
    templates: Sequence[str]
    inspect: Callable[[str, str, str], tuple[str, str]]


@dataclass(frozen=True)
class VocabularyBackend:
    """The vocabulary tab. compare: (base, other or "", text) -> (the tokens as HTML, the fertility report as a whole page)."""

    models: Callable[[], list[str]]
    compare: Callable[[str, str, str], tuple[str, str]]


@dataclass(frozen=True)
class RunView:
    """The present state of a run. curves: (title, points, whether to smooth them); log: last lines; reports: (name, file);
    finished: whether nothing is left to be resumed."""

    running: bool
    finished: bool
    facts: Sequence[tuple[str, str]]
    curves: Sequence[tuple[str, list[tuple[float, float]], bool]]
    log: str
    samples: Sequence[dict[str, str]]
    reports: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class RunsBackend:
    """The runs tab. start: (recipe, overrides) -> the run's name; stop, resume: take a run's name; compare: runs -> an HTML
    page; report: name -> its file."""

    recipes: Callable[[], list[str]]
    read: Callable[[str], str]
    start: Callable[[str, str], str]
    runs: Callable[[], list[str]]
    view: Callable[[str], RunView]
    stop: Callable[[str], None]
    resume: Callable[[str], None]
    compare: Callable[[Sequence[str]], str]
    report: Callable[[str], Path]


@dataclass(frozen=True)
class PageBackend:
    """The page: a tab for each backend that is not None. uploads: the folder of uploaded files, without links; None: none."""

    title: str
    chat: ChatBackend
    data: DataBackend | None = None
    vocabulary: VocabularyBackend | None = None
    runs: RunsBackend | None = None
    uploads: Path | None = None
