"""web: serve the workbench in the browser until Ctrl-C. The page can access only files in the given folders."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from tongwen.core.chat_template import SHIPPED
from tongwen.core.errors import DataError, MissingPackage, RecipeError, TongwenError
from tongwen.core.html import render
from tongwen.core.i18n import _
from tongwen.recipe.load import load_recipe
from tongwen.serving.last_turns import last_turns
from tongwen.serving.web.backend import (
    AT_ONCE,
    ChatBackend,
    DataBackend,
    Messages,
    PageBackend,
    RunsBackend,
    RunView,
    VocabularyBackend,
)
from tongwen.vocab import measure
from tongwen.vocab.report import as_html
from tongwen.vocab.script import Script
from tongwen.workflows import data_preview, run_manager, tokenizer_files
from tongwen.workflows.run_lock import lock_holder
from tongwen.workflows.workspace import Workspace, display_path

if TYPE_CHECKING:
    from tongwen.workflows.chat_model import ChatModel

OPEN_AT_ONCE = 2  # models in memory


def run(
    folders: Sequence[str],
    models: Sequence[str],
    *,
    adapters: Sequence[str] = (),
    system: str = "",
    sampling: Mapping[str, Any] | None = None,
    whole: bool,
    template: str,
    thinking: str,
    weights: str,
    host: str,
    port: int,
) -> int:
    """Serve the page. models: one or two that the chat opens with; adapters: of the first; sampling: the settings until a
    visitor changes them. whole: every tab, else the chat."""
    try:
        from tongwen.serving.web.server import serve
    except ModuleNotFoundError as error:
        raise MissingPackage(str(error.name), _("the page"), "web") from None
    place = Workspace.of(folders, models)
    voices = _ModelPool(place, dict.fromkeys(models[:1], tuple(adapters)), template, thinking, weights)
    for name in models:
        voices.open(name)
    known = place.models if whole else lambda: list(models)
    talk = ChatBackend(known, models, voices.fit, voices.reply, system, sampling or {})
    if not whole:
        return serve(PageBackend(f"tongwen · {Path(models[0]).name}", talk), host, port)
    return serve(make_backend(place, talk), host, port)


def make_backend(place: Workspace, talk: ChatBackend) -> PageBackend:
    """All tabs, for the files in these folders."""
    return PageBackend("同文 tongwen", talk, _look(place), _words(place), _runs(place))


class _ModelPool:
    """Models of the chat, opened at their first question; the last few stay open."""

    def __init__(
        self, place: Workspace, adapters: dict[str, tuple[str, ...]], template: str, thinking: str, weights: str
    ) -> None:
        self.place, self.adapters, self.template, self.thinking, self.weights = (
            place,
            adapters,
            template,
            thinking,
            weights,
        )
        self.opened: dict[str, ChatModel] = {}
        self.lock = threading.Lock()

    def open(self, name: str) -> ChatModel:
        """The model of this name, read when it is first asked for: the page alone needs no torch."""
        from tongwen.workflows.chat_model import open_chat_model

        model = self.place.model(name)
        with self.lock:
            if name not in self.opened:
                while len(self.opened) >= OPEN_AT_ONCE:
                    del self.opened[next(iter(self.opened))]
                adapters = self.adapters.get(name, ())
                self.opened[name] = open_chat_model(
                    model, adapters, self.template, self.thinking, weights=self.weights, rows=AT_ONCE
                )
            return self.opened[name]

    def fit(self, name: str, messages: Messages, options: dict[str, Any]) -> Messages:
        """The messages without the oldest turns that do not fit the context; the system message stays."""
        speaker = self.open(name)
        room = max(speaker.context - int(options["max_new_tokens"]), speaker.context // 2)
        return last_turns(messages, lambda turns: len(speaker.prompt_ids(turns)), room)

    def reply(self, name: str, messages: Messages, options: dict[str, Any]) -> Iterator[str]:
        return self.open(name).stream(messages, **options)


def _look(place: Workspace) -> DataBackend:
    def inspect(file: Path, model: str, template: str) -> tuple[str, str]:
        found, samples = data_preview.inspect(file), ""
        try:
            if model and found.records:
                samples = data_preview.samples_as_html(found, place.model(model), template)
        except TongwenError as error:  # such as a base without a template: show the content of the file anyway
            samples = Markup("<p>{}</p>").format(error.text())
        return data_preview.as_html(found), samples

    return DataBackend(place.models, ("own", *SHIPPED), inspect)


def _words(place: Workspace) -> VocabularyBackend:
    def compare(base: str, other: str, text: str) -> tuple[str, str]:
        if not base or not text.strip():
            raise DataError(_("this needs a model and a text"))
        names = [name for name in (base, other) if name]
        coders = [tokenizer_files.open_tokenizer_files(place.model(name), to_measure=True).coder for name in names]
        report = measure.survey(coders[0], coders[1] if other else None, {_("your text"): [text]}, Script("han"))
        report["summary"] = " → ".join(names)
        tokens = [_tokens(name, coder, text) for name, coder in zip(names, coders, strict=True)]
        return "".join(tokens), as_html(_("Vocabulary"), report)

    return VocabularyBackend(place.models, compare)


def _tokens(name: str, coder: measure.MeasuredTokenizer, text: str) -> str:
    pieces = measure.pieces_of(coder, text)
    facts = _("{pieces_count:,} tokens · {count_highest:.2f} characters each").format(
        pieces_count=len(pieces), count_highest=len(text) / max(len(pieces), 1)
    )
    return render("commands/tokens.html.jinja", name=name, facts=facts, pieces=pieces)


def _runs(place: Workspace) -> RunsBackend:
    def start(recipe: str, changes: str) -> str:
        file = place.inside(recipe)
        words = changes.split()
        for word in words:
            key, _unused, value = word.partition("=")
            if key != "out" and any(mark in value for mark in "/\\~"):
                raise RecipeError(_("change paths in the recipe, not here"), place=word, remedy="out=…")
        read, _unused2 = load_recipe(file, words)
        out = place.inside(read.out)
        run_manager.start([str(file), *words], out)
        return display_path(out)

    def picture(name: str) -> RunView:
        out = place.inside(name)
        return RunView(
            running=lock_holder(out) is not None,
            facts=run_manager.facts(out),
            curves=run_manager.curves(out),
            log=run_manager.log(out),
            samples=run_manager.samples(out),
            reports=[(file.parent.name, display_path(file)) for file in run_manager.reports(out)],
        )

    return RunsBackend(
        recipes=place.recipes,
        read=lambda name: place.inside(name).read_text(encoding="utf-8", errors="replace"),
        start=start,
        runs=place.runs,
        picture=picture,
        stop=lambda name: run_manager.stop(place.inside(name)),
        resume=lambda name: run_manager.resume(place.inside(name)),
        compare=lambda names: run_manager.compare([place.inside(name) for name in names]),
        report=lambda name: _report(place, name),
    )


def _report(place: Workspace, name: str) -> Path:
    file = place.inside(name)
    if file.name != "report.html":
        raise RecipeError(_("only reports are shown"), place=name)
    return file
