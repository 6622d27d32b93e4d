"""The runs tab: start a recipe, watch its curves, stop and resume it, open and compare reports."""

from __future__ import annotations

from typing import Any
from urllib.parse import quote

import gradio as gr

from tongwen.core.html import curve, render
from tongwen.core.i18n import _
from tongwen.serving.web.backend import RunsBackend, RunView
from tongwen.serving.web.html_block import NOTE, UNQUEUED, WrapHandler, block, canvas, sheet

SECONDS = 2  # between two updates of a run
# After a restart of the server, an open page may name runs that are not listed yet; the callables check the names.
ANY: dict[str, Any] = {"allow_custom_value": True}
WIDTH = 440  # of a curve's drawing: two side by side


def add(page: gr.Blocks, runs: RunsBackend, wrap: WrapHandler) -> None:
    """Lay out the tab and connect its events."""
    with gr.Row():
        with gr.Column(scale=1, min_width=280):
            recipe = gr.Dropdown([], label=_("Recipe"), elem_id="recipe", **ANY)
            changes = gr.Textbox(
                label=_("Changes"),
                placeholder="out=runs/second sft.learning_rate=2e-4",
                lines=1,
                max_lines=4,
            )
            start = gr.Button(_("Start"), variant="primary", elem_id="start")
            with gr.Accordion(_("The recipe's text"), open=False):
                text = gr.Code(language="yaml", interactive=False, show_label=False)
        with gr.Column(scale=3, min_width=320):
            with gr.Row(elem_classes="across"):
                run = gr.Dropdown([], label=_("Run"), elem_id="run", scale=3, min_width=300, **ANY)
                stop = gr.Button(_("Stop"), elem_id="stop", min_width=90, interactive=False)
                resume = gr.Button(_("Resume"), elem_id="resume", min_width=90, interactive=False)
            view = canvas(elem_id="picture")
            with gr.Row(elem_classes="across"):
                others = gr.Dropdown([], multiselect=True, label=_("Compare with"), elem_id="others", scale=3, **ANY)
                compare = gr.Button(_("Compare"), elem_id="compare", min_width=90)
            compared = canvas(elem_id="compared")
    clock = gr.Timer(SECONDS)
    outputs = [view, stop, resume]

    def watch(name: str | None) -> tuple[Any, ...]:
        if not name:
            return block(NOTE.format(_("No run yet."))), *_buttons(None)
        view = runs.view(name)
        return block(as_html(view)), *_buttons(view.running)

    def begin(name: str, changed: str) -> Any:
        run_name = runs.start(name, changed)
        return gr.update(choices=list(dict.fromkeys([run_name, *runs.runs()])), value=run_name)

    def listed(name: str | None, chosen: str | None) -> tuple[Any, ...]:
        recipes, found = runs.recipes(), runs.runs()
        return (
            gr.update(choices=recipes, value=name or next(iter(recipes), None)),
            gr.update(choices=found, value=chosen or next(iter(found), None)),
            gr.update(choices=found),
        )

    page.load(wrap(listed), [recipe, run], [recipe, run, others], **UNQUEUED)
    recipe.change(wrap(lambda name: runs.read(name) if name else ""), recipe, text, **UNQUEUED)
    start.click(wrap(begin), [recipe, changes], run)
    gr.on([run.change, clock.tick], wrap(watch), run, outputs, **UNQUEUED)
    stop.click(wrap(runs.stop), run, None)
    resume.click(wrap(runs.resume), run, None)
    compare_runs = wrap(lambda name, more: block(sheet(runs.compare([name, *more]))))
    compare.click(compare_runs, [run, others], compared)


def _buttons(running: bool | None) -> tuple[Any, Any]:
    return gr.update(interactive=running is True), gr.update(interactive=running is False)


def as_html(view: RunView) -> str:
    """Return the state of a run as HTML."""
    step, before, after = _("step"), _("before"), _("after")
    return render(
        "serving/web/run.html.jinja",
        facts=view.facts,
        headings={
            "reports": _("Reports"),
            "log": _("Log"),
            "samples": _("Before and after"),
        },
        reports=[(name, f"/report?name={quote(file)}") for name, file in view.reports],
        curves=[(title, curve(points, step, "", width=WIDTH, smooth=smooth)) for title, points, smooth in view.curves],
        log=view.log,
        samples=[
            (sample["question"], [(before, sample["before"]), (after, sample["after"])]) for sample in view.samples
        ],
    )
