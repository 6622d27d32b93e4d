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

from tongwen.core import artifact, console
from tongwen.core.errors import MissingPackage
from tongwen.core.i18n import _
from tongwen.infer.answer_log import AnswerJournal
from tongwen.infer.generation import Sampling
from tongwen.recipe.data import SourceConfig
from tongwen.workflows.chat_model import choose_engine, open_chat_model
from tongwen.workflows.eval_prompts import EvalPrompt, read_questions


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
    """answer_each: takes conversations and a callback for each answer; prompt: gives a conversation as the model reads it."""

    answer_each: Callable[[list[list[dict[str, Any]]], Callable[[int, str], None]], None]
    prompt: Callable[[list[dict[str, Any]]], str]


def run(
    who: AnswerSource, prompts: str, out: str, *, form: str, batch_size: int, sampling: dict[str, Any], again: bool
) -> int:
    """Answer every row that has no answer yet, then write them all."""
    file = Path(out)
    questions = read_questions(SourceConfig(path=prompts))
    if file.exists():
        artifact.clear_path(file, again=again)
    asked = hashlib.sha256(json.dumps([one.messages for one in questions], ensure_ascii=False).encode()).hexdigest()
    if who.engine == "auto" and not who.endpoint:
        who = replace(who, engine=choose_engine(who.model, who.adapters))
    settings = {**vars(who), "sampling": sampling, "prompts": f"{len(questions)} · {asked[:16]}"}
    beside = file.with_name(file.name + ".answers")
    if again:
        beside.unlink(missing_ok=True)
    journal = AnswerJournal(beside, settings, _("--again starts over"))
    missing = [row for row in range(len(questions)) if row not in journal.answers]
    if len(missing) < len(questions):
        console.notice(_("{count} answers already exist").format(count=len(questions) - len(missing)))
    answerer = _open(who, batch_size, sampling)
    with console.progress(len(questions), "generate", len(journal.answers)) as bar:

        def take(place: int, answer: str) -> None:
            journal.add(missing[place], answer)
            bar.update(len(journal.answers))

        answerer.answer_each([questions[row].messages for row in missing], take)
    journal.close()
    _write(file, form, questions, journal.answers, answerer.prompt, sampling)
    beside.unlink()
    console.success(f"{len(questions)} · {file}")
    console.emit({"answers": len(questions), "new": len(missing), "out": str(file)})
    return 0


def _open(who: AnswerSource, batch_size: int, sampling: dict[str, Any]) -> AnswerBackend:
    if who.endpoint:
        try:
            from tongwen.infer.endpoint import EndpointBackend
        except ImportError:
            raise MissingPackage("openai", _("getting answers from an endpoint"), "endpoint") from None
        wanted = Sampling().with_(**sampling)
        endpoint = EndpointBackend(who.endpoint, who.model, completion=who.template == "completion")
        return AnswerBackend(
            lambda conversations, take: endpoint.answer_each(conversations, wanted, take),
            lambda messages: str(messages[-1]["content"]),
        )
    speaker = open_chat_model(
        who.model,
        who.adapters,
        who.template,
        who.thinking,
        weights=who.weights,
        engine=who.engine,
        rows=batch_size,
    )
    return AnswerBackend(
        lambda conversations, take: speaker.answer_each(conversations, take, batch_size, **sampling),
        speaker.prompt_text,
    )


def _write(
    file: Path,
    form: str,
    questions: Sequence[EvalPrompt],
    answers: Mapping[int, str],
    prompt: Callable[[list[dict[str, Any]]], str],
    sampling: dict[str, Any],
) -> None:
    """All rows in their order. belle and chinese-llama-alpaca: one array, as the scripts of these projects wrote it."""
    pairs = [(question, answers[row]) for row, question in enumerate(questions)]
    if form == "jsonl":
        rows = [
            {"prompt": one.last, "messages": one.messages, "answer": said}
            | ({"target": one.wanted} if one.wanted is not None else {})
            for one, said in pairs
        ]
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    elif form == "belle":
        table = [{"input": prompt(one.messages), "predict": said, "target": one.wanted} for one, said in pairs]
        text = json.dumps(table, ensure_ascii=False, indent=4)
    else:
        table = [{"Input": prompt(one.messages), "Output": said} for one, said in pairs]
        text = json.dumps(table, ensure_ascii=False, indent=2)
        artifact.write_json(file.with_name("generation_config.json"), sampling)
    artifact.write_text(file, text)
