"""The data tab: shows an uploaded file's format, ledger, problems row by row, and samples as a model will see them."""

from __future__ import annotations

from typing import Any

import gradio as gr

from tongwen.core.i18n import _
from tongwen.serving.web.backend import DataBackend
from tongwen.serving.web.html_block import NOTE, UNQUEUED, WrapHandler, block, canvas


def add(page: gr.Blocks, backend: DataBackend, wrap: WrapHandler) -> None:
    """Lay out the tab and connect its events."""

    def names() -> list[Any]:
        return [(_("none: show only the rows"), ""), *backend.models()]

    models = backend.models()
    with gr.Row():
        with gr.Column(scale=1, min_width=260):
            file = gr.File(label=_("A data file in any format"), height=150, elem_id="dropped")
            model = gr.Dropdown(
                names(),
                value=next(iter(models), ""),
                label=_("Tokens as this model sees them"),
            )
            template = gr.Dropdown(
                list(backend.templates), value=backend.templates[0], label=_("Template"), elem_id="template"
            )
        with gr.Column(scale=3, min_width=320):
            dropped = _("Files dropped here are deleted when the server stops.")
            ledger = canvas(NOTE.format(dropped))
            samples = canvas(elem_id="samples")

    def read(path: str | None, *chosen: str) -> tuple[str, str]:
        if not path:
            return "", ""
        rows, samples_html = backend.inspect(path, *chosen)
        return block(rows), block(samples_html)

    gr.on([file.change, model.change, template.change], wrap(read), [file, model, template], [ledger, samples])
    page.load(wrap(lambda: gr.update(choices=names())), None, model, **UNQUEUED)
