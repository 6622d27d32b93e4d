"""Saved conversations: stored in the reader's own browser, to open again, delete, or export as a file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import gradio as gr
from markupsafe import Markup

from tongwen.core.i18n import _
from tongwen.serving.web.backend import Messages
from tongwen.serving.web.conversation import as_json, as_markdown, download_link, drawn, is_note, text_of, title_of
from tongwen.serving.web.html_block import NOTE, UNQUEUED, WrapHandler, block, canvas

MAX_SAVED = 50  # conversations, the newest first

SavedList = list[dict[str, Any]]  # items: number, title, boards (messages of each side), system


@dataclass(frozen=True)
class SavedChats:
    """The list of saved conversations and its buttons. number: the open conversation's, 0 for a new one."""

    saved: gr.BrowserState
    number: gr.State
    picker: gr.Dropdown
    fresh: gr.Button
    forget: gr.Button
    export: gr.Markdown

    @classmethod
    def create(cls) -> SavedChats:
        picker = gr.Dropdown([], label=_("Conversations"), elem_id="conversations")
        with gr.Row():
            fresh = gr.Button(_("New"), size="sm", min_width=60, elem_id="fresh")
            forget = gr.Button(_("Delete"), size="sm", min_width=60, elem_id="forget")
        secret = "tongwen"  # noqa: S105 (Gradio requires one; the data stays in the reader's own browser)
        saved = gr.BrowserState([], storage_key="tongwen.conversations", secret=secret)
        return cls(saved, gr.State(0), picker, fresh, forget, canvas(elem_id="export"))

    def connect(
        self, page: gr.Blocks, wrap: WrapHandler, save_after: Sequence[Any], outputs: Sequence[Any], system: gr.Textbox
    ) -> None:
        """Save the conversation after each of the events in `save_after`; open and delete on request. outputs: two chat
        boxes, and the speed under each."""
        boards = outputs[:2]
        state, empty = [self.saved, self.number], [self.number, self.picker, *outputs, self.export]
        for event in save_after:
            event.then(wrap(_save), [*state, *boards, system], [*state, self.picker, self.export], **UNQUEUED)
        opened = [self.number, *outputs, system, self.export]
        self.picker.input(wrap(_open), [self.saved, self.picker], opened, **UNQUEUED)
        self.fresh.click(wrap(_begin), None, empty, **UNQUEUED)
        deleted = self.forget.click(wrap(_forget), state, self.saved, **UNQUEUED)
        deleted.then(wrap(_begin), None, empty, **UNQUEUED).then(wrap(_listed), state, self.picker, **UNQUEUED)
        page.load(wrap(_listed), state, self.picker, **UNQUEUED)


def _save(saved: SavedList, number: int, left: Messages, right: Messages, system: str) -> tuple[Any, ...]:
    if not left:
        return saved, number, gr.skip(), ""
    number = number or 1 + max((chat["number"] for chat in saved), default=0)
    boards = [_plain(left), _plain(right)]
    new = {"number": number, "title": title_of(left), "boards": boards, "system": system}
    saved = [new, *(chat for chat in saved if chat["number"] != number)][:MAX_SAVED]
    return saved, number, _listed(saved, number), _export(boards[0], system)


def _plain(messages: Messages) -> Messages:
    return [{"role": one["role"], "content": text_of(one["content"])} for one in messages if not is_note(one)]


def _open(saved: SavedList, number: int) -> tuple[Any, ...]:
    found = next((chat for chat in saved if chat["number"] == number), None)
    if found is None:
        return 0, [], [], "", "", gr.skip(), ""
    boards = [[{**one, "content": drawn(one["content"])} for one in board] for board in found["boards"]]
    return number, *boards, "", "", found["system"], _export(found["boards"][0], found["system"])


def _begin() -> tuple[Any, ...]:
    return 0, None, [], [], "", "", ""


def _forget(saved: SavedList, number: int) -> SavedList:
    return [chat for chat in saved if chat["number"] != number]


def _listed(saved: SavedList, number: int) -> Any:
    return gr.update(choices=[(chat["title"], chat["number"]) for chat in saved], value=number or None)


def _export(messages: Messages, system: str) -> str:
    links = (
        download_link("conversation.md", _("Export as Markdown"), as_markdown(messages, system)),
        download_link("conversation.json", _("as JSON"), as_json(messages, system)),
    )
    return block(NOTE.format(Markup(" · ").join(links)))
