"""Conversations that are kept: in the reader's own browser, to be opened again, deleted, or taken along as a file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import gradio as gr
from markupsafe import Markup

from tongwen.core.i18n import _
from tongwen.serving.web.backend import Messages
from tongwen.serving.web.conversation import as_json, as_markdown, download_link, drawn, is_note, text_of, title_of
from tongwen.serving.web.html_block import NOTE, SWIFT, Hear, block, canvas

KEPT = 50  # conversations, the newest first

Kept = list[dict[str, Any]]  # number, title, boards (messages of each side), system


@dataclass(frozen=True)
class SavedChats:
    """number: of the open conversation among those kept, 0 for one that is new."""

    kept: gr.BrowserState
    number: gr.State
    picker: gr.Dropdown
    fresh: gr.Button
    forget: gr.Button
    export: gr.Markdown

    @classmethod
    def laid_out(cls) -> SavedChats:
        picker = gr.Dropdown([], label=_("Conversations"), elem_id="conversations")
        with gr.Row():
            fresh = gr.Button(_("New"), size="sm", min_width=60, elem_id="fresh")
            forget = gr.Button(_("Delete"), size="sm", min_width=60, elem_id="forget")
        secret = "tongwen"  # noqa: S105 (Gradio wants one; it is the reader's own browser)
        kept = gr.BrowserState([], storage_key="tongwen.conversations", secret=secret)
        return cls(kept, gr.State(0), picker, fresh, forget, canvas(elem_id="export"))

    def tie(self, page: gr.Blocks, hear: Hear, after: Sequence[Any], shown: Sequence[Any], system: gr.Textbox) -> None:
        """Keep what stands on the boards after each of these events; open and delete when asked. shown: two boards, and
        the pace under each."""
        boards = shown[:2]
        state, empty = [self.kept, self.number], [self.number, self.picker, *shown, self.export]
        for event in after:
            event.then(hear(_keep), [*state, *boards, system], [*state, self.picker, self.export], **SWIFT)
        opened = [self.number, *shown, system, self.export]
        self.picker.input(hear(_open), [self.kept, self.picker], opened, **SWIFT)
        self.fresh.click(hear(_begin), None, empty, **SWIFT)
        gone = self.forget.click(hear(_forget), state, self.kept, **SWIFT)
        gone.then(hear(_begin), None, empty, **SWIFT).then(hear(_listed), state, self.picker, **SWIFT)
        page.load(hear(_listed), state, self.picker, **SWIFT)


def _keep(kept: Kept, number: int, left: Messages, right: Messages, system: str) -> tuple[Any, ...]:
    if not left:
        return kept, number, gr.skip(), ""
    number = number or 1 + max((one["number"] for one in kept), default=0)
    boards = [_plain(left), _plain(right)]
    new = {"number": number, "title": title_of(left), "boards": boards, "system": system}
    kept = [new, *(one for one in kept if one["number"] != number)][:KEPT]
    return kept, number, _listed(kept, number), _export(boards[0], system)


def _plain(messages: Messages) -> Messages:
    return [{"role": one["role"], "content": text_of(one["content"])} for one in messages if not is_note(one)]


def _open(kept: Kept, number: int) -> tuple[Any, ...]:
    found = next((one for one in kept if one["number"] == number), None)
    if found is None:
        return 0, [], [], "", "", gr.skip(), ""
    boards = [[{**one, "content": drawn(one["content"])} for one in board] for board in found["boards"]]
    return number, *boards, "", "", found["system"], _export(found["boards"][0], found["system"])


def _begin() -> tuple[Any, ...]:
    return 0, None, [], [], "", "", ""


def _forget(kept: Kept, number: int) -> Kept:
    return [one for one in kept if one["number"] != number]


def _listed(kept: Kept, number: int) -> Any:
    return gr.update(choices=[(one["title"], one["number"]) for one in kept], value=number or None)


def _export(messages: Messages, system: str) -> str:
    links = (
        download_link("conversation.md", _("Export as Markdown"), as_markdown(messages, system)),
        download_link("conversation.json", _("as JSON"), as_json(messages, system)),
    )
    return block(NOTE.format(Markup(" · ").join(links)))
