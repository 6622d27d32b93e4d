"""The vocabulary tab: a text's tokens before and after an extension, and the fertility report."""

from __future__ import annotations

from typing import Any

import gradio as gr

from tongwen.core.i18n import _
from tongwen.serving.web.backend import VocabularyBackend
from tongwen.serving.web.html_block import UNQUEUED, WrapHandler, block, canvas, sheet

EXAMPLE = "人工智能正在改变我们学习语言的方式。月亮自己不会发光，它反射太阳的光。"


def add(page: gr.Blocks, backend: VocabularyBackend, wrap: WrapHandler) -> None:
    """Lay out the tab and connect its events."""
    names = backend.models()
    with gr.Column():
        with gr.Row():
            base = gr.Dropdown(names, value=next(iter(names), None), label=_("Before"))
            other = gr.Dropdown([("—", ""), *names], value="", label=_("After"))
        text = gr.Textbox(EXAMPLE, label=_("Text"), lines=4, max_lines=12, elem_id="text")
        show_tokens = gr.Button(_("Show the tokens"), variant="primary", elem_id="cut")
        tokens = canvas(elem_id="tokens")
        report = canvas()

    def show(*inputs: str) -> tuple[str, str]:
        pieces, page_html = backend.compare(*inputs)
        return block(pieces), block(sheet(page_html))

    def listed() -> list[Any]:
        return [gr.update(choices=backend.models()), gr.update(choices=[("—", ""), *backend.models()])]

    show_tokens.click(wrap(show), [base, other, text], [tokens, report])
    page.load(wrap(listed), None, [base, other], **UNQUEUED)
