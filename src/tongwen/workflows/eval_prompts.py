"""Read a file's rows as prompts: conversations up to the model's answer, with the reference answer if there is one.

All formats of fine-tuning are supported, and also plain lines, `prompt` alone, and conversations that end with a
question. An unreadable row stops the command: a score over fewer rows would not be comparable.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

from tongwen.core import console
from tongwen.core.errors import DataError
from tongwen.core.i18n import _
from tongwen.core.records import Dialogue, Document, Origin
from tongwen.data.files import find_files
from tongwen.data.formats import (
    ANSWERS,
    read_dialogue,
    read_document,
    read_question,
    recognise,
    recognise_row,
    with_columns,
)
from tongwen.data.message_log import join_messages
from tongwen.data.prepare_steps import describe_unread
from tongwen.data.reader import read_rows
from tongwen.data.row import RawRow
from tongwen.recipe.data import SourceConfig

SHAPES = '{"prompt": "…"}   {"instruction": "…", "output": "…"}   {"messages": […]}'
REFERENCES = (*ANSWERS, "target", "std_answer")


@dataclass(frozen=True)
class EvalPrompt:
    """A conversation to answer.

    messages: dictionaries with `role` and `content`; reference: the text of the answer in the data, if any; place: file
    and row; tools: that the answer may call; unread: fields of the row that nothing reads.
    """

    messages: list[dict[str, Any]]
    reference: str | None
    place: str
    tools: Sequence[dict[str, Any]] = ()
    unread: tuple[str, ...] = ()

    @property
    def last(self) -> str:
        return str(self.messages[-1]["content"])


@dataclass(frozen=True)
class ToolQuestion:
    """A conversation whose answer may call tools. calls: of the answer in the data, none where it is text alone."""

    prompt: EvalPrompt
    calls: tuple[dict[str, Any], ...]


def read_questions(source: SourceConfig) -> list[EvalPrompt]:
    """Return all rows of a file, folder or glob; a notice names their unread fields. Raises DataError at the first row
    without a question."""
    lines = source.model_copy(update={"records": source.records or "line"})
    questions = [_question(row, source) for row in _rows(lines)]
    _report_unread(questions, source.path)
    return questions


def read_records(source: SourceConfig) -> list[Document | Dialogue]:
    """Return documents and answered dialogues whose text is to be scored. Rows with an empty answer are left out, with
    a notice. Raises DataError at the first row that is neither."""
    rows = list(_rows(source))
    answered = [row for row in rows if not _is_unanswered(row.value)]
    report_unanswered(len(rows) - len(answered), source.path)
    records = [_record(row, source) for row in answered]
    _report_unread(records, source.path)
    return records


def read_tool_questions(source: SourceConfig) -> list[ToolQuestion]:
    """Return a question for each answer of the rows with tools, and how many rows have none as a notice."""
    rows = list(_rows(source))
    records = [record for row in rows if isinstance(record := _record(row, source), Dialogue) and record.tools]
    if len(records) < len(rows):
        console.notice(
            _("{path}: {count} rows without tools are not scored").format(
                path=source.path, count=len(rows) - len(records)
            )
        )
    out = []
    for record in records:
        turns = [message.to_dict() for message in record.messages]
        for at, turn in enumerate(turns):
            if at and turn["role"] == "assistant":
                prompt = EvalPrompt(turns[:at], turn["content"], str(record.origin), record.tools, record.unread)
                out.append(ToolQuestion(prompt, tuple(turn.get("tool_calls") or ())))
    _report_unread([one.prompt for one in out], source.path)
    return out


def report_unanswered(count: int, path: str) -> None:
    """Print how many rows have no reference answer, if any."""
    if count:
        console.notice(_("{path}: {count} rows without an answer are not scored").format(path=path, count=count))


def _report_unread(records: Iterable[EvalPrompt | Document | Dialogue], path: str) -> None:
    counts = Counter(name for record in records for name in record.unread)
    if notice := describe_unread({path: counts}):
        console.notice(notice)


def _rows(source: SourceConfig) -> Iterator[RawRow]:
    for row in islice(chain.from_iterable(_rows_of(file, source) for file in find_files(source.path)), source.rows):
        if row.problem:
            raise DataError(row.problem, place=_place(row))
        yield row


def _rows_of(file: Path, source: SourceConfig) -> Iterator[RawRow]:
    rows = read_rows(file, source, console.notice)
    return rows if source.format else join_messages(rows, source, console.notice)


def _place(row: RawRow) -> str:
    return f"{row.file}:{row.row}"


def _question(row: RawRow, source: SourceConfig) -> EvalPrompt:
    if _asks_only(with_columns(row.value, source) if isinstance(row.value, dict) else None):
        return _without_answer(row, source)
    record = _record(row, source)
    if isinstance(record, Document):
        return EvalPrompt([{"role": "user", "content": record.text}], None, _place(row), unread=record.unread)
    turns = [message.to_dict() for message in record.messages]
    reference = record.messages[-1].content or None  # an answer that only calls tools has no text
    return EvalPrompt(turns[:-1], reference, _place(row), record.tools, record.unread)


def _record(row: RawRow, source: SourceConfig) -> Document | Dialogue:
    origin = Origin(row.file, row.row)
    try:
        named = with_columns(row.value, source) if isinstance(row.value, dict) else row.value
        if (source.format or recognise(named)) == "text":
            return read_document(row.value, source, origin)
        return read_dialogue(row.value, source.format or recognise_row(row, source), source, {}, origin)
    except DataError as error:
        raise DataError(
            error.rule, place=error.place or _place(row), remedy="; ".join(filter(None, (SHAPES, error.remedy)))
        ) from None


def _without_answer(row: RawRow, source: SourceConfig) -> EvalPrompt:
    """Return the conversation of a row that ends with a question."""
    try:
        found = read_question(row.value, source, Origin(row.file, row.row))
    except DataError as error:
        raise DataError(error.rule, place=_place(row), remedy=SHAPES) from None
    turns = [message.to_dict() for message in found.messages]
    return EvalPrompt(turns, None, _place(row), found.tools, found.unread)


def _asks_only(value: Any) -> bool:
    """Return whether a row is a question without an answer."""
    if not isinstance(value, dict):
        return False
    turns = value.get("messages")
    if isinstance(turns, list) and turns and all(isinstance(turn, dict) for turn in turns):
        return turns[-1].get("role") != "assistant" and all(
            isinstance(turn.get("content"), (str, list)) for turn in turns
        )
    if not value.keys().isdisjoint(REFERENCES) and not _is_unanswered(value):
        return False
    prompt = next((value[key] for key in ("prompt", "instruction", "question", "query") if key in value), None)
    return isinstance(prompt, str) and bool(prompt.strip())


def _is_unanswered(value: Any) -> bool:
    """Return whether a row has a key for the answer, and its value is empty."""
    answers = [value[key] for key in REFERENCES if key in value] if isinstance(value, dict) else []
    return bool(answers) and all(isinstance(answer, str) and not answer.strip() for answer in answers)
