"""An examination: papers are read before a model is opened, a model sits them, and what it gets is figures with their
spread.

Every paper gives each of its rows a few counts (see `infer.measures`); so two models that sat the same paper are compared
row by row, also when one of them could not take a row.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tongwen.core.errors import DataError, MissingPackage, ModelError, NumbersError, RecipeError
from tongwen.core.i18n import _
from tongwen.core.records import Dialogue, Document
from tongwen.data.files import find_files
from tongwen.infer import metrics, multiple_choice
from tongwen.infer.multiple_choice import MultipleChoiceQuestion
from tongwen.recipe.outputs import TaskConfig
from tongwen.workflows.chat_model import ChatModel
from tongwen.workflows.eval_prompts import EvalPrompt, read_questions, read_records, say_unanswered
from tongwen.workflows.likelihood import Likelihood

Figures = Callable[[np.ndarray], dict[str, float]]
Progress = Callable[[int], None]
Ask = Callable[[Sequence[Sequence[Mapping[str, Any]]], Progress], list[str]]


@dataclass
class Scores:
    """What a model got. counts: of each row that was scored; shown: what people read of each row; groups: of rows that
    belong together, by name; notes: what is to be said."""

    counts: dict[int, Sequence[float]] = field(default_factory=dict)
    shown: dict[int, dict[str, Any]] = field(default_factory=dict)
    groups: dict[str, list[int]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def put(self, row: int, counts: Sequence[float], shown: dict[str, Any], group: str = "") -> None:
        self.counts[row], self.shown[row] = counts, shown
        if group:
            self.groups.setdefault(group, []).append(row)

    def table(self, rows: Sequence[int]) -> np.ndarray:
        """(N, K)"""
        return np.array([self.counts[row] for row in rows], np.float64)


@dataclass(frozen=True)
class EvalTask(ABC):
    """One task with what is asked in it."""

    task: TaskConfig

    @abstractmethod
    def __len__(self) -> int: ...

    @property
    @abstractmethod
    def figures(self) -> Figures:
        """Sums of counts -> figures, the main one first."""

    @abstractmethod
    def sit(self, speaker: ChatModel, ask: Ask, progress: Progress) -> Scores:
        """Have a model sit it. ask: gives the answer to each conversation."""

    def result(self, marks: Scores) -> dict[str, Any]:
        """What stands in scores.json. Raises DataError when no row could be scored."""
        if not marks.counts:
            raise DataError(_("no row could be scored"), place=self.task.title)
        out = metrics.summarise(marks.table(sorted(marks.counts)), self.figures)
        if len(marks.groups) > 1:
            out["groups"] = {
                name: {**self.figures(marks.table(rows).sum(axis=0)), "rows": len(rows)}
                for name, rows in sorted(marks.groups.items())
            }
        return out

    def change(self, before: Scores, after: Scores) -> dict[str, float]:
        """The difference on the rows that both were scored on."""
        both = sorted(before.counts.keys() & after.counts.keys())
        return metrics.compare(before.table(both), after.table(both), self.figures)


def read_task(task: TaskConfig) -> EvalTask:
    """The paper of a task. Raises DataError when its data cannot be read."""
    if task.suite:
        return LmEvalTask(task)
    assert task.data
    if task.task == "multiple_choice":
        return _read_choices(task)
    if task.task in metrics.TEXT:
        return GenerationTask(task, _first(task, _answered(task, read_questions(task.data))))
    return LikelihoodTask(task, _first(task, read_records(task.data)))


def _first(task: TaskConfig, rows: list[Any]) -> list[Any]:
    return rows[: task.limit]


def _answered(task: TaskConfig, questions: list[EvalPrompt]) -> list[EvalPrompt]:
    """The questions whose answer is known. Raises DataError when there is none, or when an answer is not of the task's form."""
    assert task.data
    known = [one for one in questions if one.wanted is not None]
    if not known:
        raise DataError(
            _("{task} needs reference answers, but no row has one").format(task=task.task),
            place=questions[0].place,
            remedy='{"instruction": "…", "output": "…"}',
        )
    say_unanswered(len(questions) - len(known), task.data.path)
    for one in known:
        if problem := metrics.TEXT[task.task].check(str(one.wanted)):
            raise DataError(problem, place=one.place, remedy=r'"北京_地名\n李白_人名"')
    return known


# -- answers -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class GenerationTask(EvalTask):
    """Questions whose answers are written out and compared with the data's."""

    questions: list[EvalPrompt]

    def __len__(self) -> int:
        return len(self.questions)

    @property
    def figures(self) -> Figures:
        return metrics.TEXT[self.task.task].figures

    def sit(self, speaker: ChatModel, ask: Ask, progress: Progress) -> Scores:
        answers = ask([one.messages for one in self.questions], progress)
        measure, marks = metrics.TEXT[self.task.task], Scores()
        for row, (question, said) in enumerate(zip(self.questions, answers, strict=True)):
            answered = metrics.AnsweredPrompt(question.last, metrics.without_thinking(said), str(question.wanted))
            marks.put(row, measure.count(answered), answered._asdict())
        return marks


# -- options -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MultipleChoiceTask(EvalTask):
    """Questions with options: the model's answer is the one that it holds to be the likeliest."""

    choices: list[MultipleChoiceQuestion]
    examples: dict[str, list[MultipleChoiceQuestion]]

    def __len__(self) -> int:
        return len(self.choices)

    @property
    def figures(self) -> Figures:
        return metrics.accuracy_of

    def sit(self, speaker: ChatModel, ask: Ask, progress: Progress) -> Scores:
        marks, judge = Scores(), Likelihood(speaker)
        for row, one in enumerate(self.choices):
            examples = self.examples.get(one.subject, [])[: self.task.shots]
            if speaker.template is None:
                asked, said = [{"role": "user", "content": multiple_choice.text(one, examples)}], one.layout.blank
            else:
                asked, said = multiple_choice.conversation(one, examples), ""
            nats = judge.nats_of(asked, [said + letter for letter in one.letters])
            _check_numbers(nats, self.task.title)
            picked = int(np.argmin(nats))
            shown = {"question": one.prompt(), "answer": one.letters[picked], "wanted": one.letters[one.answer]}
            marks.put(row, (float(picked == one.answer), 1.0), shown, one.subject)
            progress(row + 1)
        return marks


def _read_choices(task: TaskConfig) -> MultipleChoiceTask:
    assert task.data
    choices = [one for file in find_files(task.data.path) for one in multiple_choice.read_choices(file)]
    examples: dict[str, list[MultipleChoiceQuestion]] = {}
    for file in find_files(task.examples) if task.examples else ():
        for one in multiple_choice.read_choices(file):
            examples.setdefault(one.subject, []).append(one)
    short = sorted({one.subject for one in choices if len(examples.get(one.subject, ())) < task.shots})
    if short:
        raise DataError(
            _("fewer than {shots} examples for {short}").format(shots=task.shots, short=_(', ').join(short)),
            place=str(task.examples),
            remedy=_("the example file is named after its question file: SUBJECT_dev.csv"),
        )  # fmt: skip
    return MultipleChoiceTask(task, _first(task, choices), examples)


# -- likelihood ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LikelihoodTask(EvalTask):
    """Texts, and how well the model foresees them: documents whole, of dialogues the answers."""

    records: list[Document | Dialogue]

    def __len__(self) -> int:
        return len(self.records)

    @property
    def figures(self) -> Figures:
        return metrics.LIKELIHOOD[self.task.task]

    def sit(self, speaker: ChatModel, ask: Ask, progress: Progress) -> Scores:
        marks, judge = Scores(), Likelihood(speaker)
        for row, record in enumerate(self.records):
            counts = judge.score(record)
            if counts is not None:
                _check_numbers(np.array(counts), self.task.title)
                is_text = isinstance(record, Document)
                text = record.text if isinstance(record, Document) else record.messages[-1].content
                marks.put(row, counts, {"wanted": text}, "documents" if is_text else "dialogues")
            progress(row + 1)
        if missing := len(self.records) - len(marks.counts):
            marks.notes.append(
                _(
                    "{missing} dialogues exceed the model's context or are refused by its template; they are not scored"
                ).format(missing=missing)
            )
        return marks


# -- suites --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LmEvalTask(EvalTask):
    """A suite of EleutherAI's harness, which brings questions and scorer; `data` is a folder with tasks of one's own."""

    def __len__(self) -> int:
        return 1

    @property
    def figures(self) -> Figures:
        return metrics.score_of

    def sit(self, speaker: ChatModel, ask: Ask, progress: Progress) -> Scores:
        try:
            from lm_eval import simple_evaluate
            from lm_eval.models.huggingface import HFLM
            from lm_eval.tasks import TaskManager
        except ImportError:
            raise MissingPackage("lm_eval", self.task.suite, "lm-eval") from None
        manager = TaskManager(include_path=self.task.data.path if self.task.data else None)
        if not manager.match_tasks([self.task.suite]):
            raise RecipeError(
                _("lm_eval has no such task"),
                place=self.task.suite,
                remedy="lm-eval ls tasks",
            )
        tokenizer = speaker.voice.tokenizer
        found = simple_evaluate(
            model=HFLM(pretrained=speaker.voice.model, tokenizer=tokenizer),
            tasks=[self.task.suite],
            num_fewshot=self.task.shots or None,
            limit=self.task.limit,
            apply_chat_template=speaker.template is not None and bool(tokenizer.chat_template),
            task_manager=manager,
            bootstrap_iters=0,
        )
        marks = Scores()
        for name, samples in sorted(found["samples"].items()):
            for sample in samples:
                value = sample[sample["metrics"][0]]
                if not isinstance(value, (int, float)):
                    raise ModelError(
                        _("{metrics} is not a score of a single row").format(metrics=sample["metrics"][0]),
                        place=name,
                    )
                marks.put(len(marks.counts), (float(value), 1.0), {"wanted": str(sample["target"])}, name)
        progress(1)
        return marks


def _check_numbers(values: np.ndarray, place: str) -> None:
    if not np.isfinite(values).all():
        raise NumbersError(_("the model gives NaN logits"), place=place, remedy="precision: fp32 / bf16")
