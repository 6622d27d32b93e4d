"""Evaluation tasks: read their data before a model is opened, run a model on them, return scores with their spread.

A task gives each row a few counts (see `infer.metrics`). Two models can therefore be compared row by row, also if one
of them could not be scored on some rows.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tongwen.core import console
from tongwen.core.errors import DataError, MissingPackage, ModelError, NumbersError, RecipeError
from tongwen.core.i18n import _
from tongwen.core.json_schema import same_json, schema_problem, unchecked_words, value_problem
from tongwen.core.message_layout import body_of, read_arguments
from tongwen.core.records import Dialogue, Document
from tongwen.core.tool_parser import schemas_of
from tongwen.data.files import find_files
from tongwen.infer import metrics, multiple_choice
from tongwen.infer.multiple_choice import MultipleChoiceQuestion
from tongwen.recipe.outputs import TaskConfig
from tongwen.workflows.chat_model import ChatModel
from tongwen.workflows.eval_prompts import (
    EvalPrompt,
    ToolQuestion,
    read_questions,
    read_records,
    read_tool_questions,
    report_unanswered,
)
from tongwen.workflows.likelihood import Likelihood

Figures = Callable[[np.ndarray], dict[str, float]]
Progress = Callable[[int], None]
Ask = Callable[[Sequence[EvalPrompt], Progress], list[str]]


@dataclass
class Scores:
    """A model's results on a task.

    counts: of each scored row; shown: text of each row for the report; groups: rows by group name; notes: for the user.
    """

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
    """A task with its data."""

    config: TaskConfig

    @abstractmethod
    def __len__(self) -> int: ...

    @property
    @abstractmethod
    def figures(self) -> Figures:
        """The function from summed counts to metrics, the main one first."""

    @abstractmethod
    def run(self, chat_model: ChatModel, ask: Ask, progress: Progress) -> Scores:
        """Score a model on the task. ask: returns the answer to each question."""

    def result(self, scores: Scores) -> dict[str, Any]:
        """Return the task's entry in scores.json. Raises DataError if no row was scored."""
        if not scores.counts:
            raise DataError(_("no row could be scored"), place=self.config.title)
        out = metrics.summarise(scores.table(sorted(scores.counts)), self.figures)
        if len(scores.groups) > 1:
            out["groups"] = {
                name: {**self.figures(scores.table(rows).sum(axis=0)), "rows": len(rows)}
                for name, rows in sorted(scores.groups.items())
            }
        return out

    def change(self, before: Scores, after: Scores) -> dict[str, float]:
        """Return the difference on the rows that both models were scored on."""
        both = sorted(before.counts.keys() & after.counts.keys())
        return metrics.compare(before.table(both), after.table(both), self.figures)


def read_task(task: TaskConfig) -> EvalTask:
    """Read the data of a task. Raises DataError if it cannot be read."""
    if task.suite:
        return LmEvalTask(task)
    assert task.data
    if task.task == "multiple_choice":
        return _read_choices(task)
    if task.task == "tool_calls":
        return _read_tool_calls(task)
    if task.task in metrics.TEXT:
        return GenerationTask(task, _first(task, _answered(task, read_questions(task.data))))
    return LikelihoodTask(task, _first(task, read_records(task.data)))


def _first(task: TaskConfig, rows: list[Any]) -> list[Any]:
    return rows[: task.limit]


def _answered(task: TaskConfig, questions: list[EvalPrompt]) -> list[EvalPrompt]:
    """Return the questions with a reference answer. Raises DataError if none has one, or one is malformed."""
    assert task.data
    known = [one for one in questions if one.reference is not None]
    if not known:
        raise DataError(
            _("{task} needs reference answers, but no row has one").format(task=task.task),
            place=questions[0].place,
            remedy='{"instruction": "…", "output": "…"}',
        )
    report_unanswered(len(questions) - len(known), task.data.path)
    for one in known:
        if problem := metrics.TEXT[task.task].check(str(one.reference)):
            raise DataError(problem, place=one.place, remedy=r'"北京_地名\n李白_人名"')
    return known


# -- answers -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class GenerationTask(EvalTask):
    """Questions whose generated answers are compared with the reference answers."""

    questions: list[EvalPrompt]

    def __len__(self) -> int:
        return len(self.questions)

    @property
    def figures(self) -> Figures:
        return metrics.TEXT[self.config.task].figures

    def run(self, chat_model: ChatModel, ask: Ask, progress: Progress) -> Scores:
        answers = ask(self.questions, progress)
        measure, scores = metrics.TEXT[self.config.task], Scores()
        for row, (question, answer) in enumerate(zip(self.questions, answers, strict=True)):
            prompt = metrics.AnsweredPrompt(question.last, metrics.without_thinking(answer), str(question.reference))
            scores.put(row, measure.count(prompt), prompt._asdict())
        return scores


@dataclass(frozen=True)
class ToolCallTask(EvalTask):
    """Answers that may call tools: compared with the calls in the data as JSON, and checked by the schemas of the row's tools."""

    questions: list[ToolQuestion]

    def __len__(self) -> int:
        return len(self.questions)

    @property
    def figures(self) -> Figures:
        return metrics.tool_calls_of

    def run(self, chat_model: ChatModel, ask: Ask, progress: Progress) -> Scores:
        parser, scores = chat_model.tool_parser, Scores()
        answers = ask([one.prompt for one in self.questions], progress)
        for row, (question, answer) in enumerate(zip(self.questions, answers, strict=True)):
            tools = question.prompt.tools
            made, _text = parser.read(metrics.without_thinking(answer), schemas_of(tools))
            calls = [(call.name, json.loads(call.arguments)) for call in made]
            inner = [body_of(call) for call in question.calls]
            wanted = [(one["name"], read_arguments(one.get("arguments") or {})) for one in inner]
            problems = [problem for call in calls if (problem := _call_problem(*call, tools))]
            shown = {"question": question.prompt.last, "answer": answer, "wanted": _as_lines(wanted)}
            counts = (
                _are_same(calls, wanted),
                sorted(name for name, _arguments in calls) == sorted(name for name, _arguments in wanted),
                not problems,
                bool(calls),
                1,
            )
            scores.put(row, list(map(float, counts)), shown | ({"problem": problems[0]} if problems else {}))
        return scores


def _read_tool_calls(task: TaskConfig) -> ToolCallTask:
    assert task.data
    questions = read_tool_questions(task.data)
    if not questions:
        raise DataError(
            _("no row has tools"), place=task.data.path, remedy='{"messages": […], "tools": [{"type": "function", …}]}'
        )
    unchecked: set[str] = set()
    for one in questions:
        for tool in one.prompt.tools:
            schema = body_of(tool).get("parameters") or {}
            if problem := schema_problem(schema, "parameters"):
                raise DataError(problem, place=one.prompt.place)
            unchecked |= unchecked_words(schema)
    if unchecked:
        console.notice(
            _("these words of the tools' schemas are not checked: {words}").format(words=", ".join(sorted(unchecked)))
        )
    return ToolCallTask(task, _first(task, questions))


def _call_problem(name: str, arguments: dict[str, Any], tools: Sequence[dict[str, Any]]) -> str:
    """Return what is wrong with a call by the schema of its tool, "" if nothing is."""
    schemas = {body_of(tool).get("name"): body_of(tool).get("parameters") or {} for tool in tools}
    if name not in schemas:
        return _("there is no tool {name!r}").format(name=name)
    return value_problem(arguments, schemas[name], name)


def _are_same(calls: Sequence[tuple[str, Any]], wanted: Sequence[tuple[str, Any]]) -> bool:
    """Whether two answers make the same calls, in any order."""
    left = list(wanted)
    for name, arguments in calls:
        found = next((at for at, one in enumerate(left) if one[0] == name and same_json(one[1], arguments)), None)
        if found is None:
            return False
        del left[found]
    return not left


def _as_lines(calls: Sequence[tuple[str, Any]]) -> str:
    return "\n".join(f"{name} {json.dumps(arguments, ensure_ascii=False)}" for name, arguments in calls)


# -- options -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MultipleChoiceTask(EvalTask):
    """Questions with options: the model's answer is the option with the highest likelihood."""

    choices: list[MultipleChoiceQuestion]
    examples: dict[str, list[MultipleChoiceQuestion]]

    def __len__(self) -> int:
        return len(self.choices)

    @property
    def figures(self) -> Figures:
        return metrics.accuracy_of

    def run(self, chat_model: ChatModel, ask: Ask, progress: Progress) -> Scores:
        scores, likelihood = Scores(), Likelihood(chat_model)
        for row, one in enumerate(self.choices):
            examples = self.examples.get(one.subject, [])[: self.config.shots]
            if chat_model.template is None:
                messages, prefix = [{"role": "user", "content": multiple_choice.text(one, examples)}], one.layout.blank
            else:
                messages, prefix = multiple_choice.conversation(one, examples), ""
            nats = likelihood.nats_of(messages, [prefix + letter for letter in one.letters])
            _check_numbers(nats, self.config.title)
            picked = int(np.argmin(nats))
            shown = {"question": one.prompt(), "answer": one.letters[picked], "wanted": one.letters[one.answer]}
            scores.put(row, (float(picked == one.answer), 1.0), shown, one.subject)
            progress(row + 1)
        return scores


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
    """Texts scored by likelihood: whole documents, and the answers of dialogues."""

    records: list[Document | Dialogue]

    def __len__(self) -> int:
        return len(self.records)

    @property
    def figures(self) -> Figures:
        return metrics.LIKELIHOOD[self.config.task]

    def run(self, chat_model: ChatModel, ask: Ask, progress: Progress) -> Scores:
        scores, likelihood = Scores(), Likelihood(chat_model)
        for row, record in enumerate(self.records):
            counts = likelihood.score(record)
            if counts is not None:
                _check_numbers(np.array(counts), self.config.title)
                is_text = isinstance(record, Document)
                text = record.text if isinstance(record, Document) else record.messages[-1].content
                scores.put(row, counts, {"wanted": text}, "documents" if is_text else "dialogues")
            progress(row + 1)
        if missing := len(self.records) - len(scores.counts):
            scores.notes.append(
                _(
                    "{missing} dialogues exceed the model's context or are refused by its template; they are not scored"
                ).format(missing=missing)
            )
        return scores


# -- suites --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LmEvalTask(EvalTask):
    """A task of EleutherAI's lm_eval, which has its own data and metrics; `data` is a folder with further tasks."""

    def __len__(self) -> int:
        return 1

    @property
    def figures(self) -> Figures:
        return metrics.score_of

    def run(self, chat_model: ChatModel, ask: Ask, progress: Progress) -> Scores:
        try:
            from lm_eval import simple_evaluate
            from lm_eval.models.huggingface import HFLM
            from lm_eval.tasks import TaskManager
        except ImportError:
            raise MissingPackage("lm_eval", self.config.suite, "lm-eval") from None
        manager = TaskManager(include_path=self.config.data.path if self.config.data else None)
        if not manager.match_tasks([self.config.suite]):
            raise RecipeError(
                _("lm_eval has no such task"),
                place=self.config.suite,
                remedy="lm-eval ls tasks",
            )
        tokenizer = chat_model.generator.tokenizer
        found = simple_evaluate(
            model=HFLM(pretrained=chat_model.generator.model, tokenizer=tokenizer),
            tasks=[self.config.suite],
            num_fewshot=self.config.shots or None,
            limit=self.config.limit,
            apply_chat_template=chat_model.template is not None and bool(tokenizer.chat_template),
            task_manager=manager,
            bootstrap_iters=0,
        )
        scores = Scores()
        for name, samples in sorted(found["samples"].items()):
            for sample in samples:
                value = sample[sample["metrics"][0]]
                if not isinstance(value, (int, float)):
                    raise ModelError(
                        _("{metrics} is not a score of a single row").format(metrics=sample["metrics"][0]),
                        place=name,
                    )
                scores.put(len(scores.counts), (float(value), 1.0), {"wanted": str(sample["target"])}, name)
        progress(1)
        return scores


def _check_numbers(values: np.ndarray, place: str) -> None:
    if not np.isfinite(values).all():
        raise NumbersError(_("the model gives NaN logits"), place=place, remedy="precision: fp32 / bf16")
