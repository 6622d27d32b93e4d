"""Synthesize dialogues with an endpoint from topics, documents or seed tasks; write them with their provenance.

Each reply is written to the journal before it is used. A killed run therefore continues where it was, and pays twice
only for requests that were still in progress. Rejected replies are written too, with the reason.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from tongwen.core import artifact, console
from tongwen.core.errors import DataError, MissingPackage, RowRejected
from tongwen.core.i18n import _
from tongwen.core.records import Origin
from tongwen.data.files import find_files
from tongwen.data.formats import read_document
from tongwen.data.reader import read_rows
from tongwen.data.synthesis import generate
from tongwen.data.synthesis.journal import ReplyJournal
from tongwen.data.synthesis.parse import ParsedTask
from tongwen.recipe.data import SourceConfig, Synthesize


def synthesize(section: Synthesize, seed: int, settings: dict[str, Any], out: Path) -> artifact.Artifact:
    """Send requests until there are enough usable dialogues, and write them. settings: recorded in the manifest."""
    try:
        from tongwen.data.synthesis import client
    except ImportError:
        raise MissingPackage("openai", "synthesize", "synthesize") from None
    console.header("synthesize", f"{section.model} · {section.endpoint}")
    made = generate.GeneratedDialogues(section)
    requests = _requests(section, seed, made)
    spending = client.SpendingMeter(section)
    with (
        artifact.create(out, "synthesize", {}, settings, resumable=True) as draft,
        ReplyJournal(draft.path / "journal.jsonl") as journal,
    ):
        if journal.replies:
            console.notice(_("{count} replies already exist").format(count=len(journal.replies)))
        for reply in journal.replies.values():
            spending.requests += 1
            spending.count(reply.tokens)

        async def ask() -> None:
            endpoint = client.SynthesisClient(section, spending, console.notice)

            async def complete(request: generate.Request) -> tuple[str, str, tuple[int, int]]:
                return await endpoint.complete(request.prompt, request.schema)

            async with endpoint.client:
                await generate.gather(
                    requests,
                    made,
                    journal,
                    complete,
                    client.RequestFailed,
                    lambda rows: bar.update(rows, spending.summary()),
                )

        with console.progress(section.rows, "synthesize") as bar:
            asyncio.run(ask())
        _check_made(made)
        _write(draft.path / "dialogues.jsonl", made.rows)
        _write(draft.path / "rejected.jsonl", made.rejected)
        draft.facts = {
            "rows": len(made.rows),
            "rejected": dict(made.reasons),
            "spent": {
                "requests": spending.requests,
                "prompt_tokens": spending.tokens[0],
                "answer_tokens": spending.tokens[1],
                **({"money": spending.money(spending.tokens)} if section.price else {}),
            },
        }
    assert draft.artifact
    lost = ", ".join(f"{reason} {count}" for reason, count in made.reasons.most_common())
    console.success(_("{count} dialogues · {spending}").format(count=len(made.rows), spending=spending.summary()))
    if lost:
        console.info(_("not used: {lost}").format(lost=lost))
    return draft.artifact


def _requests(section: Synthesize, seed: int, made: generate.GeneratedDialogues) -> Iterable[generate.Request]:
    if section.method == "topics":
        return generate.by_topics(section.topics, seed)
    if section.method == "documents":
        return generate.about_documents(read_documents(section.documents))
    seeds = _seeds(section.seeds)
    for task in seeds:
        made.index.add(task.question)  # a reply that repeats a seed task is not new
    return generate.self_instruct(seeds, seed)


def _seeds(file: str | None) -> list[ParsedTask]:
    if file is None:
        return generate.shipped_seeds()
    seeds = []
    for found in find_files(file):
        for row in read_rows(found, SourceConfig(path=file), console.notice):
            if row.problem:
                raise DataError(row.problem, place=f"{row.file}:{row.row}")
            seeds.append(generate.read_seed(row.value, f"{row.file}:{row.row}"))
    if len(seeds) < generate.EXAMPLES:
        raise DataError(
            _("only {count} seed tasks, but each prompt needs {examples}").format(
                count=len(seeds), examples=generate.EXAMPLES
            ),
            place=file,
        )
    return seeds


def read_documents(sources: list[SourceConfig]) -> Iterator[tuple[str, str]]:
    for source in sources:
        rows = (row for file in find_files(source.path) for row in read_rows(file, source, console.notice))
        for row in islice(rows, source.rows):
            origin = Origin(row.file, row.row)
            try:
                if row.problem:
                    raise RowRejected("unreadable", row.problem)
                value = row.value if isinstance(row.value, dict) else {"text": row.value}
                yield read_document(value, source, origin).text, str(origin)
            except RowRejected as error:
                console.notice(f"{origin}: {error.rule}")


def _check_made(made: generate.GeneratedDialogues) -> None:
    """Raise DataError if there are no dialogues; print a notice if there are fewer than the recipe asks for."""
    wanted = made.section.rows
    if not made.rows:
        reasons = ", ".join(f"{reason} {count}" for reason, count in made.reasons.most_common())
        raise DataError(
            _("no reply contained a usable row: {reasons}").format(reasons=reasons),
            place="synthesize",
            remedy=_("try another model or method"),
        )
    if len(made.rows) < wanted:
        cause = (
            _("{stale} replies in a row contained nothing new").format(stale=made.stale)
            if made.enough
            else _("nothing more to ask about")
        )
        console.notice(_("got {count} of {wanted} rows: {why}").format(count=len(made.rows), wanted=wanted, why=cause))


def _write(file: Path, rows: list[dict[str, Any]]) -> None:
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    file.write_bytes(text.encode("utf-8", "backslashreplace"))
