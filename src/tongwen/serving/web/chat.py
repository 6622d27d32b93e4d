"""The chat tab: one model, or two that answer the same question, with presets, saved conversations and export."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import gradio as gr

from tongwen.core.i18n import _
from tongwen.serving.web.backend import CONCURRENCY, ChatBackend, Messages
from tongwen.serving.web.conversation import Explain, StreamedAnswer, drawn, stream, text_of
from tongwen.serving.web.html_block import NO_PROGRESS, UNQUEUED, WrapHandler
from tongwen.serving.web.saved_chats import SavedChats

MOST_TOKENS = 4096
LATEX: list[dict[str, str | bool]] = [
    {"left": "$$", "right": "$$", "display": True},
    {"left": "\\[", "right": "\\]", "display": True},
    {"left": "\\(", "right": "\\)", "display": False},
]
SAMPLING_NAMES = ("temperature", "top_p", "top_k", "repetition_penalty")
# the values of each preset, in the order of SAMPLING_NAMES
PRESETS: dict[str, tuple[float, float, int, float]] = {
    "exact": (0.0, 1.0, 0, 1.0),
    "balanced": (0.7, 0.8, 20, 1.05),
    "lively": (1.0, 0.95, 0, 1.0),
}

Outputs = tuple[Any, ...]  # two chat boxes, two speeds


class ChatColumn(NamedTuple):
    """One model's half of the tab."""

    model: gr.Dropdown
    board: gr.Chatbot
    pace: gr.Markdown


def add(page: gr.Blocks, backend: ChatBackend, wrap: WrapHandler, explain: Explain) -> None:
    """Lay out the tab and connect its events."""
    both = len(backend.chosen) > 1
    with gr.Row():
        with gr.Column(scale=3, min_width=320):
            with gr.Row():
                left = _add_column(backend, 0)
                with gr.Column(visible=both, min_width=260) as second:
                    right = _add_column(backend, 1)
            box = _question()
        with gr.Column(scale=1, min_width=260):
            saved_chats = SavedChats.create()
            side_by_side = gr.Checkbox(
                both,
                label=_("Two models side by side"),
                container=False,
                visible=len(backend.models()) > 1,
            )
            system = gr.Textbox(backend.system, label=_("System prompt"), lines=2, max_lines=8)
            with gr.Accordion(_("Sampling"), open=False):
                sampling_inputs = _add_sampling_inputs(wrap, backend.settings)
    boards = [left.board, right.board]
    inputs = [*boards, side_by_side, left.model, right.model, system, *sampling_inputs]
    handlers = _ChatHandlers(backend, explain)
    outputs = [*boards, left.pace, right.pace]
    busy: dict[str, Any] = {**NO_PROGRESS, "concurrency_limit": CONCURRENCY, "concurrency_id": "talk"}
    # Update the box first: an update sent among an answer's pieces may be lost when many arrive at once.
    text = gr.State("")
    submitted = box.submit(lambda question: (question, _answering(value="")), box, [text, box], **UNQUEUED)
    events: list[Any] = [submitted.then(wrap(handlers.ask), [text, *inputs], outputs, **busy)]
    for board in boards:
        events.append(
            board.retry(_answering, None, box, **UNQUEUED).then(wrap(handlers.again), inputs, outputs, **busy)
        )
        events.append(board.edit(wrap(handlers.mend), inputs, outputs, **busy))
    finished = [event.then(_at_rest, None, box, **UNQUEUED) for event in events]
    stopped = box.stop(_at_rest, None, box, cancels=events, **UNQUEUED)
    saved_chats.connect(page, wrap, [*finished, stopped], outputs, system)
    models = [left.model, right.model]
    page.load(wrap(lambda: [gr.update(choices=backend.models())] * 2), None, models, **UNQUEUED)
    side_by_side.change(lambda on: gr.update(visible=on), side_by_side, second, **UNQUEUED)


@dataclass(frozen=True)
class _ChatHandlers:
    """Answer the questions in both chat boxes. choices: side_by_side, two models, system prompt, sampling values."""

    backend: ChatBackend
    explain: Explain

    def ask(self, text: str, left: Messages, right: Messages, *choices: Any) -> Iterator[Outputs]:
        if text.strip():
            question = {"role": "user", "content": drawn(text)}
            yield from self._answer([*left, question], [*right, question] if choices[0] else right, choices)

    def again(self, left: Messages, right: Messages, *choices: Any) -> Iterator[Outputs]:
        yield from self._answer(_to_question(left), _to_question(right), choices)

    def mend(self, left: Messages, right: Messages, change: gr.EditData, *choices: Any) -> Iterator[Outputs]:
        """Answer an edited question; the messages after it are dropped."""
        index = change.index[0] if isinstance(change.index, (list, tuple)) else change.index
        question = {"role": "user", "content": drawn(text_of(change.value))}
        yield from self._answer([*left[:index], question], [*right[:index], question] if choices[0] else right, choices)

    def _answer(self, left: Messages, right: Messages, choices: Sequence[Any]) -> Iterator[Outputs]:
        side_by_side, first, second, system, *values = choices
        conversations = [(first, left), (second, right)] if side_by_side else [(first, left)]
        options = _options(values)
        answers = [
            StreamedAnswer(self.backend, history, self.explain, name, system, options)
            for name, history in conversations
        ]
        yield left, right, "", ""
        for _index in stream(answers):
            columns = [(one.messages, one.pace) for one in answers] + ([] if side_by_side else [(right, "")])
            yield columns[0][0], columns[1][0], columns[0][1], columns[1][1]


def _add_column(backend: ChatBackend, index: int) -> ChatColumn:
    with gr.Column(min_width=260):
        names = backend.models()
        model = gr.Dropdown(
            names,
            value=backend.chosen[index] if index < len(backend.chosen) else next(iter(names), None),
            label=_("Model"),
            container=False,
            visible=len(names) > 1,
            elem_id=f"model{index}",
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
            elem_id=f"board{index}",
            elem_classes="talk",
        )
        board.postprocess = partial(_with_title, board.postprocess, _("Reasoning"))  # type: ignore[method-assign]
        pace = gr.Markdown("", elem_id=f"pace{index}", elem_classes="pace", sanitize_html=True)
    return ChatColumn(model, board, pace)


def _with_title(postprocess: Callable[..., Any], title: str, messages: Any) -> Any:
    """Translate the title of the folded thinking: Gradio only has an English one."""
    outputs = postprocess(messages)
    for message in outputs.root:
        if (message.metadata or {}).get("title") == "Reasoning":
            message.metadata["title"] = title
    return outputs


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


def _answering(**updates: Any) -> Any:
    return gr.update(submit_btn=False, stop_btn=True, **updates)


def _at_rest() -> Any:
    return gr.update(submit_btn=True, stop_btn=False)


def _add_sampling_inputs(wrap: WrapHandler, settings: Mapping[str, Any]) -> list[gr.components.Component]:
    """Add the presets and the inputs that they set. Returns the inputs: new tokens, temperature, top-p, top-k, repetition
    penalty, seed. Initial values are the settings, else the first preset."""
    names = [
        (_("exact: always the same answer"), "exact"),
        (_("balanced"), "balanced"),
        (_("lively"), "lively"),
    ]
    initial = tuple(settings.get(name, default) for name, default in zip(SAMPLING_NAMES, PRESETS["exact"], strict=True))
    chosen = next((name for name, values in PRESETS.items() if values == initial), None)
    preset = gr.Radio(names, value=chosen, label=_("Preset"), container=False)
    max_tokens = settings.get("max_new_tokens", 512)
    tokens = gr.Slider(16, MOST_TOKENS, max_tokens, step=16, label=_("Maximum tokens"))
    sliders = [
        gr.Slider(0, 2, initial[0], step=0.05, label=_("Temperature")),
        gr.Slider(0.05, 1, initial[1], step=0.05, label="top-p"),
        gr.Slider(0, 200, initial[2], step=1, label="top-k"),
        gr.Slider(1, 2, initial[3], step=0.01, label=_("Repetition penalty")),
    ]
    seed = gr.Number(settings.get("seed"), label=_("Seed (empty: any)"), precision=0)
    preset.input(wrap(lambda name: list(PRESETS[name])), preset, sliders, **UNQUEUED)
    return [tokens, *sliders, seed]


def _options(values: Sequence[Any]) -> dict[str, Any]:
    """Return the values of the inputs as sampling options, clamped to their ranges."""
    tokens, temperature, top_p, top_k, penalty, seed = values
    return {
        "max_new_tokens": _clamp(int(tokens), 1, MOST_TOKENS),
        "temperature": _clamp(float(temperature), 0.0, 2.0),
        "top_p": _clamp(float(top_p), 0.05, 1.0),
        "top_k": _clamp(int(top_k), 0, 200),
        "repetition_penalty": _clamp(float(penalty), 1.0, 2.0),
        "seed": None if seed is None else _clamp(int(seed), 0, 2**31 - 1),
    }


def _clamp(value: Any, low: Any, high: Any) -> Any:
    return min(max(value, low), high)


def _to_question(messages: Messages) -> Messages:
    """Return the messages up to the last question, to answer it again."""
    questions = [index for index, one in enumerate(messages) if one["role"] == "user"]
    return messages[: questions[-1] + 1] if questions else []
