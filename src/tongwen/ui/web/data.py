"""The data tab: a file dropped in; its format, ledger, problems row by row, and samples as a model will see them."""

from __future__ import annotations

from pathlib import Path

import gradio as gr

from tongwen.language import say
from tongwen.ui.web.bench import Look
from tongwen.ui.web.canvas import Hear, block, canvas


def add(look: Look, hear: Hear) -> None:
    """Lay out the tab and tie its events."""
    names = look.models()
    with gr.Row():
        with gr.Column(scale=1, min_width=260):
            file = gr.File(
                label=say("A file of data, in any format", "数据文件，任意格式"), height=150, elem_id="dropped"
            )
            model = gr.Dropdown(
                [(say("none: only the rows", "不选：只看数据行"), ""), *names],
                value=next(iter(names), ""),
                label=say("Tokens as this model sees them", "按此模型的 token 显示"),
            )
            template = gr.Dropdown(list(look.templates), value=look.templates[0], label=say("Template", "模板"))
        with gr.Column(scale=3, min_width=320):
            ledger = canvas(
                f"<p class=soft>{say('Nothing is kept of what is dropped here.', '拖入的文件不会被保留。')}</p>"
            )
            samples = canvas(elem_id="samples")

    def read(path: str | None, *chosen: str) -> tuple[str, str]:
        if not path:
            return "", ""
        rows, shown = look.inspect(Path(path), *chosen)
        return block(rows), block(shown)

    gr.on([file.change, model.change, template.change], hear(read), [file, model, template], [ledger, samples])
