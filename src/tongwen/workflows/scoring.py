"""Evaluate models on tasks; write `scores.json`, the scored rows and a report.

The tasks' data is read first, so that bad data fails before a model is loaded. Then the model runs on all tasks, after
the model before it if there is one; both are compared row by row. Each answer is written to a folder beside the result
at once, so that a killed evaluation continues with the missing ones.
"""

from __future__ import annotations

import gc
import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tongwen.core import artifact, console
from tongwen.core.errors import ModelError
from tongwen.core.i18n import _
from tongwen.infer.answer_log import AnswerJournal
from tongwen.infer.report import score_table, write_report
from tongwen.model.loading.locate import locate
from tongwen.recipe.outputs import Evaluate
from tongwen.workflows.chat_model import ChatModel, open_chat_model
from tongwen.workflows.eval_prompts import EvalPrompt
from tongwen.workflows.evaluation import Ask, EvalTask, Progress, Scores

MODEL_SUFFIXES = (".safetensors", ".bin", ".gguf", ".json", ".jinja", ".model")  # files of a model or an adapter
JOURNAL = re.compile(r"[0-9a-f]{16}\.jsonl")  # a file of answers


@dataclass(frozen=True)
class EvaluatedModel:
    """A model to evaluate, and how to open it. optional: if it cannot be opened, the comparison is skipped."""

    model: str
    adapters: tuple[str, ...] = ()
    template: str = "own"
    thinking: str = "off"
    weights: str = "full"
    optional: bool = False

    @property
    def name(self) -> str:
        return " + ".join([self.model, *self.adapters])

    def open(self) -> ChatModel:
        """Open it with transformers in any case: likelihoods need the network itself."""
        return open_chat_model(
            self.model, self.adapters, self.template, self.thinking, weights=self.weights, engine="batched"
        )

    def settings(self) -> dict[str, Any]:
        """Return everything its answers depend on: the options it is opened with, and its files."""
        place = locate(self.model)
        folders = [Path(folder) for folder in (place.folder, *place.adapters, *self.adapters)]
        files = [
            file
            for folder in folders
            if folder.is_dir()
            for file in sorted(folder.iterdir())
            if file.suffix in MODEL_SUFFIXES
        ]
        return {**asdict(self), "files": [[str(file), (s := file.stat()).st_size, s.st_mtime_ns] for file in files]}


@contextmanager
def keep_answers(out: Path) -> Iterator[Path]:
    """A folder for the answers beside the result; it is removed when the result is complete."""
    folder = out.with_name(out.name + ".answers")
    yield folder
    for file in folder.glob("*.jsonl"):
        if JOURNAL.fullmatch(file.name):
            file.unlink()
    with suppress(OSError):  # something else is in it
        folder.rmdir()


def evaluate_models(
    tasks: Sequence[EvalTask],
    after: EvaluatedModel,
    before: EvaluatedModel | None,
    section: Evaluate,
    answers_folder: Path,
    out: Path | None,
) -> dict[str, Any]:
    """Return the scores by task, and write them to `out` with the rows and a report.

    answers_folder: keeps each answer as soon as it is complete.
    """
    before_scores = _run_tasks_on_base(tasks, before, section, answers_folder) if before else None
    after_scores = _run_tasks(tasks, after, section, answers_folder)
    scores = {}
    for number, task in enumerate(tasks):
        result = task.result(after_scores[number])
        if before_scores:
            result |= {
                "before": task.result(before_scores[number]),
                "change": task.change(before_scores[number], after_scores[number]),
            }
        scores[task.config.title] = result
    console.table(*score_table(scores))
    if out is not None:
        _write(
            out, tasks, scores, after_scores, before_scores, after.name, before.name if before and before_scores else ""
        )
    console.emit({"scores": scores})
    return scores


def _run_tasks(
    tasks: Sequence[EvalTask], model: EvaluatedModel, section: Evaluate, answers_folder: Path
) -> list[Scores]:
    chat_model, out = model.open(), []
    ask = _make_ask(chat_model, section, answers_folder, model.settings())
    for task in tasks:
        with console.progress(len(task), f"{task.config.title} · {model.name}") as bar:
            out.append(task.run(chat_model, ask, bar.update))
        for note in out[-1].notes:
            console.notice(note)
    del chat_model, ask
    gc.collect()  # the next model needs the memory
    return out


def _run_tasks_on_base(
    tasks: Sequence[EvalTask], model: EvaluatedModel, section: Evaluate, answers_folder: Path
) -> list[Scores] | None:
    try:
        return _run_tasks(tasks, model, section, answers_folder)
    except ModelError as error:  # such as a base whose tokenizer lacks tokens of the trained template
        if not model.optional:
            raise
        console.notice(_("not compared with the base: {error}").format(error=error.text()))
        return None


def _make_ask(chat_model: ChatModel, section: Evaluate, answers_folder: Path, model_settings: dict[str, Any]) -> Ask:
    """Return a function that answers questions, each only once across tasks and interrupted runs."""
    known: dict[str, str] = {}

    def ask(questions: Sequence[EvalPrompt], progress: Progress) -> list[str]:
        keys = [
            json.dumps([one.messages, *one.tools] if one.tools else one.messages, ensure_ascii=False)
            for one in questions
        ]
        new = {key: one for key, one in zip(keys, questions, strict=True) if key not in known}
        if new:
            answer(new, lambda: progress(sum(key in known for key in keys)))
        return [known[key] for key in keys]

    def answer(new: Mapping[str, EvalPrompt], on_answer: Callable[[], None]) -> None:
        names = list(new)
        asked = {"sitter": model_settings, "max_new_tokens": section.max_new_tokens, "asked": names}
        # One file for each model, settings and set of prompts: answers made otherwise are never reused.
        digest = hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:16]
        with closing(
            AnswerJournal(answers_folder / f"{digest}.jsonl", {"way": digest}, f"rm -r {answers_folder}")
        ) as journal:
            missing = [index for index in range(len(names)) if index not in journal.answers]
            known.update((names[index], text) for index, text in journal.answers.items())
            if existing := len(names) - len(missing):
                console.notice(_("{there} answers already exist").format(there=existing))

            def keep(index: int, text: str) -> None:
                journal.add(missing[index], text)
                known[names[missing[index]]] = text
                on_answer()

            wanted = [new[names[index]] for index in missing]
            chat_model.answer_each(
                [one.messages for one in wanted],
                keep,
                section.batch_size,
                [one.tools for one in wanted],
                max_new_tokens=section.max_new_tokens,
            )

    return ask


def _write(
    out: Path,
    tasks: Sequence[EvalTask],
    scores: dict[str, Any],
    after: list[Scores],
    before: list[Scores] | None,
    name: str,
    old: str,
) -> None:
    artifact.write_json(out / "scores.json", scores)
    rows = {
        task.config.title: _rows(after[number], before[number] if before else None) for number, task in enumerate(tasks)
    }
    with (out / "rows.jsonl").open("w", encoding="utf-8") as stream:
        for title, some in rows.items():
            stream.writelines(json.dumps({"task": title, **row}, ensure_ascii=False) + "\n" for row in some)
    write_report(out / "report.html", f"{old} → {name}" if old else name, scores, rows)


def _rows(after: Scores, before: Scores | None) -> list[dict[str, Any]]:
    """Return the rows for the report, with the answers of the model before."""
    out = []
    for row, shown in sorted(after.shown.items()):
        old = before.shown.get(row, {}) if before else {}
        out.append({"row": row + 1, **shown} | ({"before": old["answer"]} if "answer" in old else {}))
    return out
