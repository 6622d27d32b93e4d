"""The chat tab: one model or two that answer the same question, with presets, kept conversations and export."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import gradio as gr

from tongwen.core.i18n import _
from tongwen.serving.web.backend import AT_ONCE, ChatBackend, Messages
from tongwen.serving.web.conversation import Explain, StreamedAnswer, drawn, stream, text_of
from tongwen.serving.web.html_block import QUIET, SWIFT, Hear
from tongwen.serving.web.saved_chats import SavedChats

MOST_TOKENS = 4096
LATEX: list[dict[str, str | bool]] = [
    {"left": "$$", "right": "$$", "display": True},
    {"left": "\\[", "right": "\\]", "display": True},
    {"left": "\\(", "right": "\\)", "display": False},
]
KNOBS = ("temperature", "top_p", "top_k", "repetition_penalty")
# what each preset sets them to
PRESETS: dict[str, tuple[float, float, int, float]] = {
    "exact": (0.0, 1.0, 0, 1.0),
    "balanced": (0.7, 0.8, 20, 1.05),
    "lively": (1.0, 0.95, 0, 1.0),
}

Shown = tuple[Any, ...]  # two boards, two paces


class ChatColumn(NamedTuple):
    """One model's half of the tab."""

    model: gr.Dropdown
    board: gr.Chatbot
    pace: gr.Markdown


def add(page: gr.Blocks, talk: ChatBackend, hear: Hear, explain: Explain) -> None:
    """Lay out the tab and tie its events."""
    both = len(talk.chosen) > 1
    with gr.Row():
        with gr.Column(scale=3, min_width=320):
            with gr.Row():
                left = _side(talk, 0)
                with gr.Column(visible=both, min_width=260) as second:
                    right = _side(talk, 1)
            box = _question()
        with gr.Column(scale=1, min_width=260):
            shelf = SavedChats.laid_out()
            beside = gr.Checkbox(
                both,
                label=_("Two models side by side"),
                container=False,
                visible=len(talk.models()) > 1,
            )
            system = gr.Textbox(talk.system, label=_("System prompt"), lines=2, max_lines=8)
            with gr.Accordion(_("Sampling"), open=False):
                knobs = _knobs(hear, talk.settings)
    boards = [left.board, right.board]
    given = [*boards, beside, left.model, right.model, system, *knobs]
    speech = _ChatHandlers(talk, explain)
    shown = [*boards, left.pace, right.pace]
    busy: dict[str, Any] = {**QUIET, "concurrency_limit": AT_ONCE, "concurrency_id": "talk"}
    # The box first: what is sent to it among an answer's pieces may be lost when many arrive at once.
    text = gr.State("")
    taken = box.submit(lambda asked: (asked, _answering(value="")), box, [text, box], **SWIFT)
    asked: list[Any] = [taken.then(hear(speech.ask), [text, *given], shown, **busy)]
    for board in boards:
        asked.append(board.retry(_answering, None, box, **SWIFT).then(hear(speech.again), given, shown, **busy))
        asked.append(board.edit(hear(speech.mend), given, shown, **busy))
    ended = [event.then(_at_rest, None, box, **SWIFT) for event in asked]
    stopped = box.stop(_at_rest, None, box, cancels=asked, **SWIFT)
    shelf.tie(page, hear, [*ended, stopped], shown, system)
    models = [left.model, right.model]
    page.load(hear(lambda: [gr.update(choices=talk.models())] * 2), None, models, **SWIFT)
    beside.change(lambda on: gr.update(visible=on), beside, second, **SWIFT)


@dataclass(frozen=True)
class _ChatHandlers:
    """Answers to what stands on the boards. chosen: beside, two models, system, knobs."""

    talk: ChatBackend
    explain: Explain

    def ask(self, text: str, left: Messages, right: Messages, *chosen: Any) -> Iterator[Shown]:
        if text.strip():
            question = {"role": "user", "content": drawn(text)}
            yield from self._answer([*left, question], [*right, question] if chosen[0] else right, chosen)

    def again(self, left: Messages, right: Messages, *chosen: Any) -> Iterator[Shown]:
        yield from self._answer(_to_question(left), _to_question(right), chosen)

    def mend(self, left: Messages, right: Messages, change: gr.EditData, *chosen: Any) -> Iterator[Shown]:
        """A question in other words: what came after it goes."""
        place = change.index[0] if isinstance(change.index, (list, tuple)) else change.index
        question = {"role": "user", "content": drawn(text_of(change.value))}
        yield from self._answer([*left[:place], question], [*right[:place], question] if chosen[0] else right, chosen)

    def _answer(self, left: Messages, right: Messages, chosen: Sequence[Any]) -> Iterator[Shown]:
        beside, first, second, system, *values = chosen
        asked = [(first, left), (second, right)] if beside else [(first, left)]
        options = _options(values)
        answers = [StreamedAnswer(self.talk, before, self.explain, name, system, options) for name, before in asked]
        yield left, right, "", ""
        for _index in stream(answers):
            now = [(one.messages, one.pace) for one in answers] + ([] if beside else [(right, "")])
            yield now[0][0], now[1][0], now[0][1], now[1][1]


def _side(talk: ChatBackend, place: int) -> ChatColumn:
    with gr.Column(min_width=260):
        names = talk.models()
        model = gr.Dropdown(
            names,
            value=talk.chosen[place] if place < len(talk.chosen) else next(iter(names), None),
            label=_("Model"),
            container=False,
            visible=len(names) > 1,
            elem_id=f"model{place}",
        )
        board = gr.Chatbot(
            show_label=False,
            height="clamp(20rem, calc(100vh - 20rem), 60rem)",
            layout="bubble",
            editable="user",
            buttons=["copy"],
            latex_delimiters=LATEX,
            reasoning_tags=[("<think>", "</think>")],
            allow_tags=True,
            sanitize_html=True,
            feedback_options=None,
            allow_file_downloads=False,
            placeholder=_("What would you like to know?"),
            elem_id=f"board{place}",
            elem_classes="talk",
        )
        board.postprocess = partial(_titled, board.postprocess, _("Reasoning"))  # type: ignore[method-assign]
        pace = gr.Markdown("", elem_id=f"pace{place}", elem_classes="pace", sanitize_html=True)
    return ChatColumn(model, board, pace)


def _titled(postprocess: Callable[..., Any], title: str, messages: Any) -> Any:
    """What the page shows, its folded thinking under a title in the page's language: Gradio knows English alone."""
    shown = postprocess(messages)
    for message in shown.root:
        if (message.metadata or {}).get("title") == "Reasoning":
            message.metadata["title"] = title
    return shown


def _question() -> gr.Textbox:
    return gr.Textbox(
        placeholder=_("Ask something; Shift+Enter for a new line"),
        show_label=False,
        container=False,
        lines=1,
        max_lines=8,
        submit_btn=True,
        autofocus=True,
        elem_id="question",
    )


def _answering(**more: Any) -> Any:
    return gr.update(submit_btn=False, stop_btn=True, **more)


def _at_rest() -> Any:
    return gr.update(submit_btn=True, stop_btn=False)


def _knobs(hear: Hear, settings: Mapping[str, Any]) -> list[gr.components.Component]:
    """A preset's name and what it stands for: new tokens, temperature, top-p, top-k, repetition penalty, seed. They begin
    with the settings, else with the first preset."""
    names = [
        (_("exact: always the same answer"), "exact"),
        (_("balanced"), "balanced"),
        (_("lively"), "lively"),
    ]
    begin = tuple(settings.get(name, usual) for name, usual in zip(KNOBS, PRESETS["exact"], strict=True))
    chosen = next((name for name, values in PRESETS.items() if values == begin), None)
    preset = gr.Radio(names, value=chosen, label=_("Preset"), container=False)
    most = settings.get("max_new_tokens", 512)
    tokens = gr.Slider(16, MOST_TOKENS, most, step=16, label=_("Maximum tokens"))
    knobs = [
        gr.Slider(0, 2, begin[0], step=0.05, label=_("Temperature")),
        gr.Slider(0.05, 1, begin[1], step=0.05, label="top-p"),
        gr.Slider(0, 200, begin[2], step=1, label="top-k"),
        gr.Slider(1, 2, begin[3], step=0.01, label=_("Repetition penalty")),
    ]
    seed = gr.Number(settings.get("seed"), label=_("Seed (empty: any)"), precision=0)
    preset.input(hear(lambda name: list(PRESETS[name])), preset, knobs, **SWIFT)
    return [tokens, *knobs, seed]


def _options(values: Sequence[Any]) -> dict[str, Any]:
    """What the knobs say, as the model takes it; a value from beyond a knob's end is brought back to it."""
    tokens, temperature, top_p, top_k, penalty, seed = values
    return {
        "max_new_tokens": _within(int(tokens), 1, MOST_TOKENS),
        "temperature": _within(float(temperature), 0.0, 2.0),
        "top_p": _within(float(top_p), 0.05, 1.0),
        "top_k": _within(int(top_k), 0, 200),
        "repetition_penalty": _within(float(penalty), 1.0, 2.0),
        "seed": None if seed is None else _within(int(seed), 0, 2**31 - 1),
    }


def _within(value: Any, least: Any, most: Any) -> Any:
    return min(max(value, least), most)


def _to_question(messages: Messages) -> Messages:
    """Up to the last question: what stands behind it is asked for again."""
    asked = [place for place, one in enumerate(messages) if one["role"] == "user"]
    return messages[: asked[-1] + 1] if asked else []
