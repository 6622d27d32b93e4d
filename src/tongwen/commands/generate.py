"""generate: answer a file of prompts, or a dev set, row for row, in the requested format.

Answers are saved beside the output file as they come. An interrupted run continues with the missing answers; with other
settings it is refused. The output file appears when it is complete.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tongwen.core import artifact, console, originals
from tongwen.core.errors import MissingPackage
from tongwen.core.i18n import _
from tongwen.core.journal import check_journal
from tongwen.infer.answer_log import AnswerJournal
from tongwen.infer.generation import Sampling
from tongwen.recipe.data import SourceConfig
from tongwen.workflows.chat_model import choose_engine, open_chat_model
from tongwen.workflows.eval_prompts import EvalPrompt, read_questions

SETTINGS = "generation_config.json"  # beside the answers, as the script of Chinese-LLaMA-Alpaca wrote it
ANSWERED_WITH = {"model", "sampling", "prompts"}  # keys of the first line of a journal
ROW_KEYS = ({"prompt", "messages", "answer"}, {"input", "predict", "target"}, {"Input", "Output"})  # of each form


@dataclass(frozen=True)
class AnswerSource:
    """The model that answers: a local model, or the name of a model at an endpoint."""

    model: str
    adapters: Sequence[str]
    template: str
    thinking: str
    weights: str
    engine: str
    endpoint: str


@dataclass(frozen=True)
class AnswerBackend:
    """answer_each: (questions, callback for each answer); prompt: a question -> its text as the model reads it."""

    answer_each: Callable[[list[EvalPrompt], Callable[[int, str], None]], None]
    prompt: Callable[[EvalPrompt], str]


def run(
    source: AnswerSource, prompts: str, out: str, *, form: str, batch_size: int, sampling: dict[str, Any], again: bool
) -> int:
    """Answer every row that has no answer yet, then write all answers."""
    file, inputs = Path(out), [prompts, *([] if source.endpoint else [source.model]), *source.adapters]
    journal_file, settings_file = file.with_name(file.name + ".answers"), file.with_name(SETTINGS)
    originals.check_output(file, inputs, moves=again)
    questions = read_questions(SourceConfig(path=prompts))
    if form == "chinese-llama-alpaca" and not (again and _is_settings(settings_file)):
        originals.check_new(settings_file, artifact.as_json(sampling))
    check_journal(journal_file, ANSWERED_WITH)
    originals.clear_path(file, inputs, again=again, is_ours=_is_answers)
    digest = hashlib.sha256(_asked(questions)).hexdigest()
    if source.engine == "auto" and not source.endpoint:
        source = replace(source, engine=choose_engine(source.model, source.adapters))
    settings = {**vars(source), "sampling": sampling, "prompts": f"{len(questions)} · {digest[:16]}"}
    if again:
        journal_file.unlink(missing_ok=True)
    answerer = (
        _open(source, batch_size, sampling) if source.endpoint else None
    )  # before its address is written anywhere
    journal = AnswerJournal(journal_file, settings, _("--again starts over"))
    missing = [row for row in range(len(questions)) if row not in journal.answers]
    if len(missing) < len(questions):
        console.notice(_("{count} answers already exist").format(count=len(questions) - len(missing)))
    answerer = answerer or _open(source, batch_size, sampling)
    with console.progress(len(questions), "generate", len(journal.answers)) as bar:

        def on_answer(index: int, answer: str) -> None:
            journal.add(missing[index], answer)
            bar.update(len(journal.answers))

        answerer.answer_each([questions[row] for row in missing], on_answer)
    journal.close()
    _write(file, form, questions, journal.answers, answerer.prompt, sampling)
    journal_file.unlink()
    console.success(f"{len(questions)} · {file}")
    console.emit({"answers": len(questions), "new": len(missing), "out": str(file)})
    return 0


def _open(source: AnswerSource, batch_size: int, sampling: dict[str, Any]) -> AnswerBackend:
    if source.endpoint:
        try:
            from tongwen.infer.endpoint import EndpointBackend
        except ImportError:
            raise MissingPackage("openai", _("getting answers from an endpoint"), "endpoint") from None
        sampling_options = Sampling().override(**sampling)
        endpoint = EndpointBackend(source.endpoint, source.model, completion=source.template == "completion")
        return AnswerBackend(
            lambda questions, on_answer: endpoint.answer_each(
                [one.messages for one in questions], sampling_options, on_answer, [one.tools for one in questions]
            ),
            lambda question: question.last,
        )
    chat_model = open_chat_model(
        source.model,
        source.adapters,
        source.template,
        source.thinking,
        weights=source.weights,
        engine=source.engine,
        rows=batch_size,
    )
    return AnswerBackend(
        lambda questions, on_answer: chat_model.answer_each(
            [one.messages for one in questions], on_answer, batch_size, [one.tools for one in questions], **sampling
        ),
        lambda question: chat_model.prompt_text(question.messages, question.tools),
    )


def _asked(questions: Sequence[EvalPrompt]) -> bytes:
    """Return what an answer depends on in all questions, for the journal of answers."""
    asked: list[Any] = [[one.messages, list(one.tools)] if one.tools else one.messages for one in questions]
    return json.dumps(asked, ensure_ascii=False).encode()


def _write(
    file: Path,
    form: str,
    questions: Sequence[EvalPrompt],
    answers: Mapping[int, str],
    prompt: Callable[[EvalPrompt], str],
    sampling: dict[str, Any],
) -> None:
    """Write all rows in their order. belle, chinese-llama-alpaca: one array, as the scripts of these projects wrote it."""
    pairs = [(question, answers[row]) for row, question in enumerate(questions)]
    if form == "jsonl":
        rows = [
            {"prompt": one.last, "messages": one.messages, "answer": answer}
            | ({"tools": list(one.tools)} if one.tools else {})
            | ({"target": one.reference} if one.reference is not None else {})
            for one, answer in pairs
        ]
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    elif form == "belle":
        table = [{"input": prompt(one), "predict": answer, "target": one.reference} for one, answer in pairs]
        text = json.dumps(table, ensure_ascii=False, indent=4)
    else:
        table = [{"Input": prompt(one), "Output": answer} for one, answer in pairs]
        text = json.dumps(table, ensure_ascii=False, indent=2)
        settings_file, settings = file.with_name(SETTINGS), artifact.as_json(sampling)
        if _is_settings(settings_file) and settings_file.read_text(encoding="utf-8") != settings:
            artifact.put_aside(settings_file)  # `--again` with other options
        originals.write_new(settings_file, settings)
    originals.write_new(file, text)


def _is_settings(file: Path) -> bool:
    """Whether this command wrote a file of sampling options: it has all of them, in its own layout."""
    try:
        text = file.read_text(encoding="utf-8")
        found = json.loads(text)
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(found, dict) and found.keys() == vars(Sampling()).keys() and text == artifact.as_json(found)


def _is_answers(file: Path) -> bool:
    """Whether a file has the first row of a file of answers, in any form."""
    try:
        text = file.read_text(encoding="utf-8")
        first = json.loads(text)[0] if text.startswith("[") else json.loads(text.partition("\n")[0])
    except (OSError, ValueError, LookupError, RecursionError):
        return False
    return isinstance(first, dict) and any(keys <= first.keys() for keys in ROW_KEYS)
