"""A place on the page for HTML of our own.

Gradio's `HTML` evaluates strings as JavaScript, which the page's policy forbids; its `Markdown` does not. Blocks of HTML
end at an empty line in Markdown, so line ends are written as characters. Whoever makes the HTML escapes what it holds.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gradio as gr
from markupsafe import Markup

WrapHandler = Callable[[Callable[..., Any]], Callable[..., Any]]  # makes a handler speak the page's language
NO_PROGRESS: dict[str, Any] = {"show_progress": "hidden"}
# What takes no time is answered at once, by the request itself. All that waits in line is told through one stream, which
# closes when nothing waits: a request that arrives just then is answered into the closed stream, and the click is lost.
UNQUEUED: dict[str, Any] = {**NO_PROGRESS, "queue": False}
NOTE = Markup("<p class=soft>{}</p>")


def canvas(value: str = "", **options: Any) -> gr.Markdown:
    """An empty place, or one with HTML on it."""
    return gr.Markdown(block(value), sanitize_html=False, latex_delimiters=[], elem_classes="ours", **options)


def block(text: str) -> str:
    """HTML as one block of Markdown."""
    return f"<div>{text}</div>".replace("\n", "&#10;") if text else ""


def sheet(page: str) -> str:
    """A whole page inside of this one, in which nothing may run."""
    return Markup('<iframe class=sheet sandbox srcdoc="{}"></iframe>').format(str(page))
