"""web: serve the workbench in the browser until Ctrl-C. The page can access only files in the given folders."""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from tongwen.core.errors import DataError, MissingPackage, RecipeError, TongwenError
from tongwen.core.html import render
from tongwen.core.i18n import _
from tongwen.core.shipped_templates import SHIPPED
from tongwen.serving.last_turns import last_turns
from tongwen.serving.web.backend import (
    CONCURRENCY,
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
from tongwen.workflows import data_preview, page_runs, run_manager, tokenizer_files
from tongwen.workflows.run_lock import lock_holder
from tongwen.workflows.workspace import Workspace, display_path

if TYPE_CHECKING:
    from tongwen.workflows.chat_model import ChatModel

MAX_OPEN_MODELS = 2  # models in memory
_loading = threading.Lock()  # transformers imports its parts at their first use, which fails in two threads at once


def run(
    folders: Sequence[str],
    models: Sequence[str],
    *,
    adapters: Sequence[str] = (),
    system: str = "",
    sampling: Mapping[str, Any] | None = None,
    all_tabs: bool,
    template: str,
    thinking: str,
    weights: str,
    host: str,
    port: int,
) -> int:
    """Serve the page. models: one or two that the chat opens with; adapters: of the first; sampling: the settings until a
    visitor changes them. all_tabs: every tab, else only the chat."""
    try:
        from tongwen.serving.web.server import serve
    except ModuleNotFoundError as error:
        raise MissingPackage(str(error.name), _("the page"), "web") from None
    # Its name is hidden: where the page may access the folder of temporary files, no upload becomes a recipe or a model.
    with tempfile.TemporaryDirectory(prefix=".tongwen-web-") as uploads:
        workspace = Workspace.of(folders, models, uploads)
        pool = _ModelPool(workspace, dict.fromkeys(models[:1], tuple(adapters)), template, thinking, weights)
        for name in models:
            pool.open(name)
        models_of = workspace.models if all_tabs else lambda: list(models)
        chat = ChatBackend(models_of, models, pool.fit, pool.reply, system, sampling or {})
        if not all_tabs:
            return serve(PageBackend(f"tongwen · {Path(models[0]).name}", chat), host, port)
        return serve(make_backend(workspace, chat), host, port)


def make_backend(workspace: Workspace, chat: ChatBackend) -> PageBackend:
    """Return the backends of all tabs, for the files in these folders."""
    return PageBackend(
        "同文 tongwen",
        chat,
        _data_backend(workspace),
        _vocabulary_backend(workspace),
        _runs_backend(workspace),
        workspace.uploads,
    )


class _ModelPool:
    """Models of the chat, opened at their first question; the last few stay open."""

    def __init__(
        self, workspace: Workspace, adapters: dict[str, tuple[str, ...]], template: str, thinking: str, weights: str
    ) -> None:
        self.workspace, self.adapters, self.template, self.thinking, self.weights = (
            workspace,
            adapters,
            template,
            thinking,
            weights,
        )
        self.opened: dict[str, ChatModel] = {}

    def open(self, name: str) -> ChatModel:
        """Return the model of this name; load it at the first use, because the page alone needs no torch."""
        from tongwen.workflows.chat_model import open_chat_model

        model = self.workspace.model(name)
        with _loading:
            if name not in self.opened:
                while len(self.opened) >= MAX_OPEN_MODELS:
                    del self.opened[next(iter(self.opened))]
                adapters = self.adapters.get(name, ())
                self.opened[name] = open_chat_model(
                    model, adapters, self.template, self.thinking, weights=self.weights, rows=CONCURRENCY
                )
            return self.opened[name]

    def fit(self, name: str, messages: Messages, options: dict[str, Any]) -> Messages:
        """Return the messages without the oldest turns that do not fit the context; the system message stays."""
        chat_model = self.open(name)
        max_tokens = max(chat_model.context - int(options["max_new_tokens"]), chat_model.context // 2)
        return last_turns(messages, lambda turns: len(chat_model.prompt_ids(turns)), max_tokens)

    def reply(self, name: str, messages: Messages, options: dict[str, Any]) -> Iterator[str]:
        return self.open(name).stream(messages, **options)


def _data_backend(workspace: Workspace) -> DataBackend:
    templates = ("own", *SHIPPED)

    def inspect(name: str, model: str, template: str) -> tuple[str, str]:
        file, folder = workspace.upload(name), model and workspace.model(model)
        if template not in templates:
            raise RecipeError(_("this is not one of the templates"), place=template)
        found, samples = data_preview.inspect(file), ""
        try:
            if folder and found.records:
                with _loading:
                    samples = data_preview.samples_as_html(found, folder, template)
        except TongwenError as error:  # such as a base without a template: show the content of the file anyway
            samples = Markup("<p>{}</p>").format(error.text())
        return data_preview.as_html(found), samples

    return DataBackend(workspace.models, templates, inspect)


def _vocabulary_backend(workspace: Workspace) -> VocabularyBackend:
    def compare(base: str, other: str, text: str) -> tuple[str, str]:
        if not base or not text.strip():
            raise DataError(_("this needs a model and a text"))
        names = [name for name in (base, other) if name]
        models = [workspace.model(name) for name in names]
        with _loading:
            coders = [tokenizer_files.open_tokenizer_files(model, to_measure=True).coder for model in models]
        report = measure.survey(coders[0], coders[1] if other else None, {_("your text"): [text]}, Script("han"))
        report["summary"] = " → ".join(names)
        tokens = [_tokens(name, coder, text) for name, coder in zip(names, coders, strict=True)]
        return "".join(tokens), as_html(_("Vocabulary"), report)

    return VocabularyBackend(workspace.models, compare)


def _tokens(name: str, coder: measure.MeasuredTokenizer, text: str) -> str:
    pieces = measure.pieces_of(coder, text)
    facts = _("{count:,} tokens · {characters_per_token:.2f} characters each").format(
        count=len(pieces), characters_per_token=len(text) / max(len(pieces), 1)
    )
    return render("commands/tokens.html.jinja", name=name, facts=facts, pieces=pieces)


def _runs_backend(workspace: Workspace) -> RunsBackend:
    def view(name: str) -> RunView:
        out = workspace.run(name)
        return RunView(
            running=lock_holder(out) is not None,
            finished=run_manager.is_finished(out),
            facts=run_manager.facts(out),
            curves=run_manager.curves(out),
            log=run_manager.log(out),
            samples=run_manager.samples(out),
            reports=[(file.parent.name, display_path(file)) for file in run_manager.reports(out)],
        )

    return RunsBackend(
        recipes=workspace.recipes,
        read=lambda name: workspace.recipe(name).read_text(encoding="utf-8", errors="replace"),
        start=lambda recipe, changes: page_runs.start(workspace, recipe, changes.split()),
        runs=workspace.runs,
        view=view,
        stop=lambda name: page_runs.stop(workspace, name),
        resume=lambda name: page_runs.resume(workspace, name),
        compare=lambda names: run_manager.compare([workspace.run(name) for name in names]),
        report=lambda name: _report(workspace, name),
    )


def _report(workspace: Workspace, name: str) -> Path:
    file = workspace.inside(name)
    if file.name != "report.html":
        raise RecipeError(_("only reports are shown"), place=name)
    return file
