"""Scoring: models and papers in; `scores.json`, the rows behind it and a report out.

The papers are read first, so that bad data costs no minute of loading. Then each model sits them: the one to be scored, and
the one before it, where there is one; they are compared row by row. Answers are kept beside the result as they come, so that
an examination that was killed goes on with what is missing.
"""

from __future__ import annotations

import gc
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tongwen.core import artifact, console
from tongwen.core.errors import ModelError
from tongwen.core.i18n import _
from tongwen.infer.answer_log import AnswerJournal
from tongwen.infer.report import score_table, write_report
from tongwen.model.loading import load
from tongwen.recipe.outputs import Evaluate
from tongwen.workflows.chat_model import ChatModel, open_chat_model
from tongwen.workflows.evaluation import Ask, EvalTask, Progress, Scores

OWN = (".safetensors", ".bin", ".gguf", ".json", ".jinja", ".model")  # files of a model or an adapter


@dataclass(frozen=True)
class EvaluatedModel:
    """A model that is to be examined, and how it is opened. optional: nothing is compared when it cannot be."""

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
        """By transformers whatever the model is: who judges texts needs the network itself."""
        return open_chat_model(
            self.model, self.adapters, self.template, self.thinking, weights=self.weights, engine="batched"
        )

    def settings(self) -> dict[str, Any]:
        """What its answers depend on: how it is opened, and the files that it is opened from."""
        place = load.locate(self.model)
        folders = [Path(folder) for folder in (place.folder, *place.adapters, *self.adapters)]
        files = [
            file for folder in folders if folder.is_dir() for file in sorted(folder.iterdir()) if file.suffix in OWN
        ]
        return {**asdict(self), "files": [[str(file), (s := file.stat()).st_size, s.st_mtime_ns] for file in files]}


@contextmanager
def keep_answers(out: Path) -> Iterator[Path]:
    """A folder beside the result for the answers, until the result stands."""
    folder = out.with_name(out.name + ".answers")
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def examine(
    papers: Sequence[EvalTask],
    after: EvaluatedModel,
    before: EvaluatedModel | None,
    section: Evaluate,
    kept: Path,
    out: Path | None,
) -> dict[str, Any]:
    """The scores by task; written under `out` with the rows and a report. kept: where answers stand as they come."""
    first = _sit_before(papers, before, section, kept) if before else None
    marks = _sit(papers, after, section, kept)
    scores = {}
    for number, paper in enumerate(papers):
        result = paper.result(marks[number])
        if first:
            result |= {"before": paper.result(first[number]), "change": paper.change(first[number], marks[number])}
        scores[paper.task.title] = result
    console.table(*score_table(scores))
    if out is not None:
        _write(out, papers, scores, marks, first, after.name, before.name if before and first else "")
    console.emit({"scores": scores})
    return scores


def _sit(papers: Sequence[EvalTask], sitter: EvaluatedModel, section: Evaluate, kept: Path) -> list[Scores]:
    speaker, out = sitter.open(), []
    ask = _asking_once(speaker, section, kept, sitter.settings())
    for paper in papers:
        with console.progress(len(paper), f"{paper.task.title} · {sitter.name}") as bar:
            out.append(paper.sit(speaker, ask, bar.update))
        for note in out[-1].notes:
            console.notice(note)
    del speaker, ask
    gc.collect()  # the next model needs the room
    return out


def _sit_before(
    papers: Sequence[EvalTask], sitter: EvaluatedModel, section: Evaluate, kept: Path
) -> list[Scores] | None:
    try:
        return _sit(papers, sitter, section, kept)
    except ModelError as error:  # such as a base whose tokenizer cannot write the template that was taught
        if not sitter.optional:
            raise
        console.notice(_("not compared with the base: {error}").format(error=error.text()))
        return None


def _asking_once(speaker: ChatModel, section: Evaluate, kept: Path, sitter: dict[str, Any]) -> Ask:
    """Answers to conversations: what several tasks ask is answered once, and what stands in `kept` not again."""
    known: dict[str, str] = {}

    def ask(conversations: Sequence[Sequence[Mapping[str, Any]]], progress: Progress) -> list[str]:
        keys = [json.dumps(messages, ensure_ascii=False) for messages in conversations]
        new = {key: messages for key, messages in zip(keys, conversations, strict=True) if key not in known}
        if new:
            answer(new, lambda: progress(sum(key in known for key in keys)))
        return [known[key] for key in keys]

    def answer(new: Mapping[str, Sequence[Mapping[str, Any]]], tell: Callable[[], None]) -> None:
        names = list(new)
        asked = {"sitter": sitter, "max_new_tokens": section.max_new_tokens, "asked": names}
        # A file for each way of asking: answers that were given in another way are in nobody's way.
        way = hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:16]
        with closing(AnswerJournal(kept / f"{way}.jsonl", {"way": way}, f"rm -r {kept}")) as journal:
            missing = [place for place in range(len(names)) if place not in journal.answers]
            known.update((names[place], said) for place, said in journal.answers.items())
            if there := len(names) - len(missing):
                console.notice(_("{there} answers already exist").format(there=there))

            def take(place: int, said: str) -> None:
                journal.add(missing[place], said)
                known[names[missing[place]]] = said
                tell()

            wanted = [new[names[place]] for place in missing]
            speaker.answer_each(wanted, take, section.batch_size, max_new_tokens=section.max_new_tokens)

    return ask


def _write(
    out: Path,
    papers: Sequence[EvalTask],
    scores: dict[str, Any],
    after: list[Scores],
    before: list[Scores] | None,
    name: str,
    old: str,
) -> None:
    artifact.write_json(out / "scores.json", scores)
    rows = {
        paper.task.title: _rows(after[number], before[number] if before else None)
        for number, paper in enumerate(papers)
    }
    with (out / "rows.jsonl").open("w", encoding="utf-8") as stream:
        for title, some in rows.items():
            stream.writelines(json.dumps({"task": title, **row}, ensure_ascii=False) + "\n" for row in some)
    write_report(out / "report.html", f"{old} → {name}" if old else name, scores, rows)


def _rows(after: Scores, before: Scores | None) -> list[dict[str, Any]]:
    """What people read of each row, with what the model before answered."""
    out = []
    for row, shown in sorted(after.shown.items()):
        old = before.shown.get(row, {}) if before else {}
        out.append({"row": row + 1, **shown} | ({"before": old["answer"]} if "answer" in old else {}))
    return out
