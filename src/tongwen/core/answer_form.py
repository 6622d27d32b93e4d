"""How the answers of a chat template are written: the marks of thinking, and the form of tool calls.

Both are read from the template's own render. A model writes them as tokens, some of which are control tokens: `marks` names
those that must stay in the text of an answer until it is taken apart.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from tongwen.core import harmony
from tongwen.core.chat_template import Template
from tongwen.core.continuation import THINKING_BLOCK
from tongwen.core.errors import ModelError, RowRejected
from tongwen.core.i18n import _
from tongwen.core.tool_parser import EMPTY, ONE, PROBE_TOOLS, PYTHON_TAG, TWO, ToolParser, derive

THINK, END_THINK = "<think>", "</think>"
ASK, THOUGHT, SAID = {"role": "user", "content": "Q"}, "zt1zt", "zc1zc"


@dataclass(frozen=True)
class AnswerForm:
    """thinking: the marks around thinking; tools: the parser of calls, or why there is none; harmony: whether an answer is
    a series of messages in channels; marks: the control tokens that an answer is taken apart by."""

    thinking: tuple[str, str] = (THINK, END_THINK)
    tools: ToolParser | str = ""
    harmony: bool = False
    marks: frozenset[str] = frozenset()

    def plain(self, pieces: Iterator[str]) -> Iterator[str]:
        """Rewrite the answer of a model, piece by piece: its thinking stands between `<think>` and `</think>`."""
        if self.harmony:
            return harmony.plain_messages(pieces)
        return pieces if self.thinking == (THINK, END_THINK) else _renamed(pieces, *self.thinking)


def _renamed(pieces: Iterator[str], opening: str, closing: str) -> Iterator[str]:
    text = ""
    for piece in pieces:
        text += piece
        if not opening.startswith(text.lstrip()[: len(opening)]):
            break
        if text.lstrip().startswith(opening):
            yield THINK
            text = text.lstrip()[len(opening) :]
            while closing not in text and (more := next(pieces, None)) is not None:
                kept = max(len(text) - len(closing), 0)
                yield text[:kept]
                text = text[kept:] + more
            thought, found, text = text.partition(closing)
            yield thought + END_THINK * bool(found)
            break
    yield text
    yield from pieces


def find_answer_form(template: Template) -> AnswerForm:
    """Return the form of a template's answers, derived once."""
    if "answer form" not in template.found:
        template.found["answer form"] = _derive(template)
    form: AnswerForm = template.found["answer form"]
    return form


def _derive(template: Template) -> AnswerForm:
    thinking, written = _thinking(template)
    is_harmony = harmony.is_written_by(written)
    tools = harmony.tool_parser() if is_harmony else _tool_parser(template)
    if isinstance(tools, ToolParser):
        written += tools.written + PYTHON_TAG * tools.anchored
    if is_harmony:
        written += "".join(harmony.TOKENS)
    marks = frozenset(token for token in template.special if token in written and token != template.stop)
    return AnswerForm(thinking, tools, is_harmony, marks)


def _answer(template: Template, answer: dict[str, Any], tools: Sequence[dict[str, Any]] = ()) -> tuple[str, str, str]:
    """Return (prompt, answer, stop), empty where the template does not write this answer whole."""
    try:
        turn = template.answer([ASK, {"role": "assistant", **answer}], tools)
    except (RowRejected, ModelError):  # a ModelError for a template that breaks a limit of its process
        return "", "", ""
    return turn.prompt, turn.answer, turn.stop


def _thinking(template: Template) -> tuple[tuple[str, str], str]:
    """Return the marks around thinking, and all that an answer with thinking has around its texts."""
    prompt, answer, _stop = _answer(template, {"content": SAID, "reasoning_content": THOUGHT})
    before, found, rest = answer.partition(THOUGHT)
    opened = THINKING_BLOCK.search(prompt)
    if not before.strip() and opened and not opened["close"]:
        before = opened["open"]
    between = rest.partition(SAID)[0].strip()
    if not found or not before.strip() or not between or THINK in before:
        return (THINK, END_THINK), _answer(template, {"content": SAID})[1]
    return (before.strip(), between), before + rest


def _tool_parser(template: Template) -> ToolParser | str:
    """Return the parser of this template's calls, or why it has none. A template that lists no tools may still write calls."""
    for tools in (PROBE_TOOLS, ()):
        _prompt, one, stop = _answer(template, {"content": "", "tool_calls": ONE}, tools)
        if not one:
            continue
        two, empty = (_answer(template, {"content": "", "tool_calls": calls}, tools)[1] for calls in (TWO, EMPTY))
        plain = _answer(template, {"content": SAID}, tools)[1].partition(SAID)[0]
        stop = "" if template.stop in one else stop
        if parser := derive(one, two or None, empty or None, plain, stop):
            return parser
        return _("the form in which the chat template writes calls is not understood")
    return _("the chat template writes no calls")
