"""The page: its style, its tabs and its error messages. One page for each language."""

from __future__ import annotations

import functools
import inspect
import secrets
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import gradio as gr
from markupsafe import Markup, escape

from tongwen.core.errors import TongwenError
from tongwen.core.html import render
from tongwen.core.i18n import _, use_language
from tongwen.serving.web import chat, data, runs, vocabulary
from tongwen.serving.web.backend import PageBackend
from tongwen.serving.web.html_block import canvas

FONTS = ("system-ui", "-apple-system", "Segoe UI", "PingFang SC", "Noto Sans CJK SC", "Microsoft YaHei", "sans-serif")
CODE = ("ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "DejaVu Sans Mono", "monospace")
CSS = """
footer{display:none!important}.form{background:none!important;gap:.9rem!important;border:0!important}
.gradio-container{width:100%;max-width:78rem!important;margin:0 auto!important}
.top{align-items:baseline;flex-wrap:nowrap!important}.top h1{font-size:1.3rem;margin:0}.top .tongue{margin:0;text-align:right}
.talk{border:1px solid var(--line)!important;background:var(--paper)!important}
.talk .message,.talk .prose{font-size:1rem;line-height:1.75}
.talk .prose pre{border-radius:.5rem}
.talk .icon-button-wrapper.top-panel{display:none}
#conversations input{text-overflow:ellipsis;padding-right:1.6rem}
#dropped{border:1px dashed var(--line)!important;border-radius:.6rem}#dropped button{padding-top:1.6rem}
.pace{min-height:1.2rem;font-size:.85rem}.pace p{color:var(--soft);margin:0}
#question .input-container{border:1px solid var(--line);border-radius:.6rem;padding:.2rem .4rem;background:var(--paper)}
.tokens{line-height:2.1;overflow-wrap:anywhere;white-space:pre-wrap}
.tokens span{border-radius:.25rem;padding:.1rem .1rem;box-shadow:inset 0 0 0 1px #8883}
.tokens .l{background:var(--learn)}.tokens .s{background:var(--stop)}.tokens .p{color:var(--soft)}
.tokens .t0{background:#0f766e22}.tokens .t1{background:#0f766e0c}
.key span{margin-right:.6rem;padding:.1rem .5rem;border-radius:.3rem;border:1px solid var(--line);font-size:.85rem}
.key .l{background:var(--learn)}.key .s{background:var(--stop)}
.sheet{width:100%;height:44rem;border:1px solid var(--line);border-radius:.6rem;background:var(--paper)}
.ours{--learn:#bbf7d0;--stop:#fde68a}.dark .ours{--learn:#14532d;--stop:#854d0e}
.ours h3{font-size:1rem;margin:1.4rem 0 .5rem}
.ours pre.log{max-height:20rem;overflow:auto;white-space:pre-wrap;line-height:1.5;display:flex;flex-direction:column-reverse}
.ours .cards{grid-template-columns:repeat(auto-fit,minmax(8.2rem,1fr));margin:0 0 1.2rem}
.ours .curves{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(24rem,100%),1fr));gap:0 1.5rem}.ours svg{min-width:0}
.ours :is(table,thead,tbody,tr){border:0!important}.ours table.problems :is(td,th):nth-child(-n+2){white-space:nowrap;overflow-wrap:normal}
.ours table :is(td,th){border:0;border-bottom:1px solid var(--line)}.ours table.problems{table-layout:auto}
.ours table.problems :is(td,th):last-child{min-width:6rem}
.ours .qa .tokens{padding:.4rem 1rem .8rem;margin:0}.across{align-items:end}
@media (max-width:640px){.gradio-container main{padding:.6rem .8rem!important}
div:has(#board1) .talk{height:38vh!important;min-height:14rem}}
"""


def make_page(backend: PageBackend, language: str) -> Any:
    """Return the page in one language."""
    with use_language(language), gr.Blocks(title=backend.title, analytics_enabled=False) as page:
        wrap = functools.partial(wrap_handler, language)
        with gr.Row(elem_classes="top"):
            canvas(Markup("<h1>{}</h1>").format(backend.title))
            other, label = ("en", "English") if language == "zh" else ("zh", "中文")
            canvas(Markup('<p class=tongue><a href="/{}/">{}</a></p>').format(other, label))
        if not (backend.data or backend.vocabulary or backend.runs):
            chat.add(page, backend.chat, wrap, explain)
            return page
        with gr.Tab(_("Chat")):
            chat.add(page, backend.chat, wrap, explain)
        if backend.data:
            with gr.Tab(_("Data")):
                data.add(page, backend.data, wrap)
        if backend.vocabulary:
            with gr.Tab(_("Vocabulary")):
                vocabulary.add(page, backend.vocabulary, wrap)
        if backend.runs:
            with gr.Tab(_("Runs")):
                runs.add(page, backend.runs, wrap)
    return page


def theme_and_css() -> dict[str, Any]:
    """Return Gradio's arguments `theme` and `css`; all fonts are the reader's own."""
    fonts = [gr.themes.Font(name) for name in FONTS]
    theme = gr.themes.Base(
        primary_hue=gr.themes.colors.teal,
        secondary_hue=gr.themes.colors.teal,
        neutral_hue=gr.themes.colors.gray,
        radius_size=gr.themes.sizes.radius_md,
        font=fonts,
        font_mono=[gr.themes.Font(name) for name in CODE],
    ).set(
        block_border_width="0px",
        block_background_fill="transparent",
        block_padding="0px",
        input_background_fill="*background_fill_primary",
        input_border_width="1px",
    )
    return {"theme": theme, "css": _scoped() + CSS}


def _scoped() -> str:
    """Return the style of our reports (tables, cards, curves), limited to the class `ours`. Gradio chooses light or dark by
    a class, not by the browser's preference."""
    light = "--ink:#1c1e21;--soft:#6b7280;--line:#e3e6ea;--accent:#0f766e;--paper:#fff;--wash:#f6f8f9"
    dark = "--ink:#e6e8eb;--soft:#9aa3ad;--line:#2c3238;--accent:#2dd4bf;--paper:#15181b;--wash:#1c2024"
    css = render("core/parts.css")
    return f":root{{{light}}}.dark{{{dark}}}.ours{{{css}}}.soft{{color:var(--soft)}}"


def wrap_handler(language: str, handler: Callable[..., Any]) -> Callable[..., Any]:
    """Return the handler with its messages in the page's language and its errors shown on the page."""
    if inspect.isgeneratorfunction(handler):

        @functools.wraps(handler)
        def flow(*inputs: Any) -> Iterator[Any]:
            pieces = handler(*inputs)
            try:
                while True:
                    with use_language(language):
                        try:
                            piece = next(pieces)
                        except StopIteration:
                            return
                        except Exception as error:
                            raise _as_gradio_error(error) from None
                    yield piece
            finally:
                pieces.close()

        return flow

    @functools.wraps(handler)
    def call(*inputs: Any) -> Any:
        with use_language(language):
            try:
                return handler(*inputs)
            except Exception as error:
                raise _as_gradio_error(error) from None

    return call


def _as_gradio_error(error: Exception) -> gr.Error:
    if isinstance(error, gr.Error):
        return error
    text = str(escape(explain(error))).replace("\n", "<br>")
    return gr.Error(text, duration=None, title=_("This did not work"), print_exception=False)


def explain(error: Exception) -> str:
    """Return the text for the user: our own messages as they are; for other errors a number, with details in the terminal."""
    if isinstance(error, TongwenError):
        return error.text()
    if "out of memory" in str(error).lower() or isinstance(error, MemoryError):
        return _("out of memory: shorten the conversation, generate fewer tokens, or use a smaller model")
    number = secrets.token_hex(3)
    print(f"[{number}]", *traceback.format_exception(error), file=sys.stderr)
    return _("internal error; the terminal has the details under {number}").format(number=number)
