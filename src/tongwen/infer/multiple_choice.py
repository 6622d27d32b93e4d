"""Multiple-choice questions: read files in the layouts of C-Eval, CMMLU and MMLU, and format the prompts."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tongwen.core.errors import DataError
from tongwen.core.i18n import _

LETTERS = "ABCDEFGH"
SPLIT = re.compile(r"_(?:val|dev|test)$")


@dataclass(frozen=True)
class Layout:
    """A suite's prompt format. mark: text before the answer; blank: what a base model writes between mark and letter."""

    head: str
    mark: str
    blank: str = ""


CEVAL = Layout("以下是中国关于{subject}考试的单项选择题，请选出其中的正确答案。", "答案：")
CMMLU = Layout("以下是关于{subject}的单项选择题，请直接给出正确答案的选项。", "答案是：")
MMLU = Layout("The following are multiple choice questions (with answers) about {subject}.", "Answer:", " ")


@dataclass(frozen=True)
class MultipleChoiceQuestion:
    """One question. options: their texts, the first is A; answer: index of the correct one."""

    layout: Layout
    subject: str
    question: str
    options: tuple[str, ...]
    answer: int

    def prompt(self) -> str:
        """Return the question with its options and the mark after which the letter follows."""
        lines = [f"{letter}. {option}" for letter, option in zip(LETTERS, self.options, strict=False)]
        return "\n".join([self.question, *lines, self.layout.mark])

    @property
    def letters(self) -> str:
        return LETTERS[: len(self.options)]


def read_choices(file: Path) -> list[MultipleChoiceQuestion]:
    """Return all questions of a CSV file. Its name, without `_val`, `_dev` or `_test`, is the subject. Raises DataError."""
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            _("not UTF-8: {error}").format(error=error), place=str(file), remedy="iconv -f GB18030 -t UTF-8"
        ) from None
    rows = [row for row in csv.reader(io.StringIO(text, newline="")) if any(cell.strip() for cell in row)]
    if not rows:
        raise DataError(_("no questions: the file contains only whitespace"), place=str(file))
    return list(_read(rows, file))


def _read(rows: list[list[str]], file: Path) -> Iterator[MultipleChoiceQuestion]:
    names = [name.strip().lower() for name in rows[0]]
    subject = SPLIT.sub("", file.stem)
    headed = "question" in names and "answer" in names
    if headed:
        layout, columns = (CEVAL if "id" in names else CMMLU), {name: column for column, name in enumerate(names)}
    elif len(names) == 6:
        layout, columns = MMLU, {name: column for column, name in enumerate(("question", *"abcd", "answer"))}
        subject = subject.replace("_", " ")
    else:
        raise DataError(
            _("unknown layout; the first row has: {rows}").format(rows=_(', ').join(rows[0])),
            place=f"{file}:1",
            remedy="id,question,A,B,C,D,answer (C-Eval) · ,Question,A,B,C,D,Answer (CMMLU) · question,A,B,C,D,answer, no header (MMLU)",
        )  # fmt: skip
    letters = [letter for letter in LETTERS if letter.lower() in columns]
    for number, row in enumerate(rows[headed:], 1 + headed):
        yield _choice(row, columns, letters, layout, subject, f"{file}:{number}")


def _choice(
    row: list[str], columns: Mapping[str, int], letters: Sequence[str], layout: Layout, subject: str, place: str
) -> MultipleChoiceQuestion:
    if len(row) <= max(columns[name] for name in ("question", "answer", *map(str.lower, letters))):
        raise DataError(
            _("this row has {row_count} columns, but {places_count} are needed").format(row_count=len(row), places_count=len(columns)),
            place=place,
            remedy=_("put quotes around a text that contains a comma"),
        )  # fmt: skip
    options = tuple(row[columns[letter.lower()]].strip() for letter in letters)
    answer = row[columns["answer"]].strip().upper()
    if answer not in letters:
        raise DataError(
            _("the answer {answer!r} is not an option; the options are {letters}").format(answer=answer, letters=_(', ').join(letters)),
            place=place,
            remedy=_("C-Eval's test split has no answers; use its val split"),
        )  # fmt: skip
    return MultipleChoiceQuestion(layout, subject, row[columns["question"]].strip(), options, letters.index(answer))


def conversation(choice: MultipleChoiceQuestion, examples: Sequence[MultipleChoiceQuestion]) -> list[dict[str, Any]]:
    """Return the question as a chat, after answered examples of its subject."""
    turns = [question.prompt() for question in (*examples, choice)]
    turns[0] = f"{choice.layout.head.format(subject=choice.subject)}\n\n{turns[0]}"
    out: list[dict[str, Any]] = []
    for turn, question in zip(turns, (*examples, choice), strict=True):
        out += [{"role": "user", "content": turn}, {"role": "assistant", "content": question.letters[question.answer]}]
    return out[:-1]


def text(choice: MultipleChoiceQuestion, examples: Sequence[MultipleChoiceQuestion]) -> str:
    """Return the same conversation as one text, for a base model."""
    turns = conversation(choice, examples)
    gap = {"user": choice.layout.blank, "assistant": "\n\n"}
    return "".join(turn["content"] + gap[turn["role"]] for turn in turns[:-1]) + str(turns[-1]["content"])
