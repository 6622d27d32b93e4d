"""HTML blocks on the page.

Gradio's `HTML` evaluates strings as JavaScript, which the page's policy forbids; its `Markdown` does not. Markdown ends an
HTML block at an empty line, so line ends are written as character references. The caller escapes the contents.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gradio as gr
from markupsafe import Markup

WrapHandler = Callable[[Callable[..., Any]], Callable[..., Any]]  # wraps an event handler, see page.wrap_handler
NO_PROGRESS: dict[str, Any] = {"show_progress": "hidden"}
# Quick events bypass the queue and are answered in the request itself. Queued events share one stream, which closes when
# the queue is empty: a request that arrives just then is answered into the closed stream, and the click is lost.
UNQUEUED: dict[str, Any] = {**NO_PROGRESS, "queue": False}
NOTE = Markup("<p class=soft>{}</p>")


def canvas(value: str = "", **options: Any) -> gr.Markdown:
    """Return a component for HTML, empty by default."""
    return gr.Markdown(block(value), sanitize_html=False, latex_delimiters=[], elem_classes="ours", **options)


def block(text: str) -> str:
    """Return HTML as one block of Markdown."""
    return f"<div>{text}</div>".replace("\n", "&#10;") if text else ""


def sheet(page: str) -> str:
    """Return a whole page as a frame in which no script runs."""
    return Markup('<iframe class=sheet sandbox srcdoc="{}"></iframe>').format(str(page))
