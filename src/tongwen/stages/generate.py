"""generate: a file of prompts in; a file of answers out, row for row, written beside and renamed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tongwen import console
from tongwen.data.files import find_files
from tongwen.data.rows import RawRow
from tongwen.data.sources import read_rows
from tongwen.errors import DataError
from tongwen.language import say
from tongwen.recipe.schema import Source
from tongwen.speaker import open_speaker


def run(
    model: str,
    adapters: Sequence[str],
    prompts: str,
    out: str,
    *,
    batch_size: int,
    template: str,
    thinking: str,
    sampling: dict[str, Any],
) -> int:
    """Answer every prompt of the file, in its order."""
    rows = read_prompts(prompts)
    speaker = open_speaker(model, adapters, template, thinking)
    with console.progress(len(rows), "generate") as bar:
        answers = speaker.answer_all(rows, batch_size, bar.update, **sampling)
    file = Path(out)
    beside = file.with_name(file.name + ".partial")
    file.parent.mkdir(parents=True, exist_ok=True)
    with beside.open("w", encoding="utf-8") as stream:
        for messages, answer in zip(rows, answers, strict=True):
            row = {"prompt": messages[-1]["content"], "messages": messages, "answer": answer}
            stream.write(json.dumps(row, ensure_ascii=False) + "\n")
    beside.replace(file)
    console.good(say(f"{len(rows)} answers · {out}", f"{len(rows)} 个回答 · {out}"))
    console.emit({"out": out, "rows": len(rows)})
    return 0


def read_prompts(prompts: str) -> list[list[dict[str, Any]]]:
    """Conversations that wait for an answer: lines of text, or JSON rows with `prompt` or `messages`."""
    return [
        _conversation(row)
        for file in find_files(prompts)
        for row in read_rows(file, Source(path=prompts, records="line"), console.notice)
    ]


def _conversation(row: RawRow) -> list[dict[str, Any]]:
    value = row.value if isinstance(row.value, dict) else {}
    prompt = next((value[key] for key in ("prompt", "instruction", "text") if key in value), None)
    messages = value.get("messages")
    if (
        isinstance(messages, list)
        and messages
        and all(isinstance(turn, dict) and isinstance(turn.get("content"), str) for turn in messages)
    ):
        return list(messages[: -1 if messages[-1].get("role") == "assistant" else None])
    if isinstance(prompt, str) and prompt.strip():
        return [{"role": "user", "content": prompt}]
    raise DataError(
        row.problem or say("this row has neither `prompt` nor `messages`", "该行既没有 `prompt` 也没有 `messages`"),
        place=f"{row.file}:{row.row}",
        remedy='{"prompt": "…"}',
    )
