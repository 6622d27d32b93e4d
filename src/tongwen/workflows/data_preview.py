"""A look at data before anything is made of it: what a file is, which rows fail and why, and what would be learned of it.

`look` shows the samples of a recipe, the page those of a file; both colour them here.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tongwen.core import console
from tongwen.core.errors import RowRefused
from tongwen.core.html import render
from tongwen.core.i18n import _
from tongwen.core.records import Dialogue, Document
from tongwen.data import formats, prepare_steps, token_store
from tongwen.data.clean import Cleaner, Dropped
from tongwen.data.input_parts import InputPart, kind_of
from tongwen.data.ledger import Ledger, Rejected, table_rows
from tongwen.data.reader import read_rows
from tongwen.data.token_store import TokenStore
from tongwen.recipe.data import Prepare, SourceConfig
from tongwen.recipe.training import Pretrain, Sft
from tongwen.workflows.tokenized_data import RecordEncoder, read_dialogues, read_documents, say_mask

SHOWN, ENCODED, PROBLEMS = 5, 200, 100  # samples that are shown and that are tried, rows that are listed
EXCERPT = 160  # characters of a row


Problem = tuple[int, str, str, str]  # row, reason, rule, the row itself


@dataclass
class DataPreview:
    """What a file holds: its first rows that are taken, and its first that are not."""

    kind: str
    format: str
    tally: prepare_steps.ScanCounts
    problems: list[Problem] = field(default_factory=list)
    records: list[Document | Dialogue] = field(default_factory=list)


def inspect(file: Path) -> DataPreview:
    """Read a whole file as `prepare` would, and compare nothing. Raises DataError for what is no data."""
    source = SourceConfig(path=str(file))
    kind = kind_of(file, source)
    section = Prepare.model_validate({kind: [source]})
    part = InputPart(0, kind, "train", 0, source, file)
    first = next(read_rows(file, source))
    name = "text" if kind == "documents" else formats.recognise_row(first, source)
    found = DataPreview(kind, name, prepare_steps.ScanCounts())
    for raw, record in prepare_steps.iter_rows(part, section, Cleaner(section.clean, kind), lambda said: None):
        found.tally.count(raw, record)
        if not isinstance(record, (Dropped, RowRefused)):
            if len(found.records) < ENCODED:
                found.records.append(record)
        elif len(found.problems) < PROBLEMS:
            excerpt = raw.value if isinstance(raw.value, str) else json.dumps(raw.value, ensure_ascii=False)
            found.problems.append((raw.row, record.reason, record.rule, excerpt[:EXCERPT]))
    return found


def as_html(found: DataPreview) -> str:
    """Figures, ledger and problems, as a piece of a page."""
    ledger = found.tally.ledger
    more = "+" if len(found.problems) == PROBLEMS else ""
    facts = [
        (found.format, _("format")),
        (f"{ledger.items_in:,}", _("rows")),
        (f"{ledger.kept:,}", _("would be kept")),
        (f"{len(found.problems):,}{more}", _("problems")),
        (console.human_bytes(ledger.size_in), _("amount of data")),
    ]
    head = (_("ledger"), _("rows"), _("bytes"))
    rows = table_rows(ledger.to_dict(), found.kind, _("kept"))
    return render(
        "workflows/rows.html.jinja",
        facts=facts,
        ledger=(head, [(name, f"{count:,}", f"{size:,}") for name, count, size in rows]),
        refused=_refused(_("Rows that are not used"), found.problems),
    )


def samples_as_html(found: DataPreview, base: str, template: str) -> str:
    """The first records as a model will see them, learned tokens coloured. Only the model's tokenizer is opened."""
    reader: RecordEncoder
    if found.kind == "documents":
        reader = read_documents(base, Pretrain())
        stop = reader.end
    else:
        reader = dialogues = read_dialogues(base, Sft(template=template))
        stop = int(dialogues.tokenizer.convert_tokens_to_ids(dialogues.template.stop))
    rejected: list[Rejected] = []
    store = token_store.in_memory(reader.batches(iter(found.records), Ledger("rows", "tokens"), rejected.append))
    lost = [(bad.origin.row, bad.reason, bad.rule, "") for bad in rejected]
    summary, samples = "", []
    if len(store):
        first = _("Of the first {count} rows: ").format(count=len(found.records))
        summary = first + say_mask(reader.check(store, []))
        for index in range(min(SHOWN, len(store))):
            row, length = store.origin(index).row, store.lengths[index]
            heading = _("row {row} · {length} tokens").format(row=row, length=length)
            samples.append((heading, coloured(reader.tokenizer, store, index, stop)))
    return render(
        "workflows/samples.html.jinja",
        refused=_refused(_("Rows that this model does not use"), lost),
        summary=summary,
        kinds=token_kinds(),
        samples=samples,
    )


def token_kinds() -> list[tuple[str, str]]:
    """What the kinds of `coloured` mean."""
    return [
        ("p", _("prompt")),
        ("l", _("learned")),
        ("s", _("stop token, learned")),
    ]


def coloured(tokenizer: Any, store: TokenStore, index: int, stop: int) -> list[tuple[str, int, str]]:
    """(text, last id, kind) of one sample: prompt `p`, learned `l`, learned stop `s`."""
    return [
        (text, token, ("s" if token == stop else "l") if learned else "p")
        for text, token, learned in pieces(tokenizer, store, index)
    ]


def pieces(tokenizer: Any, store: TokenStore, index: int) -> Iterator[tuple[str, int, bool]]:
    """(text, last id, learned) of one sample: tokens that together make whole characters are shown as one piece."""
    waiting: list[int] = []
    ids, learn = store.sample(index)
    for token, learned in zip(ids.tolist(), learn.tolist(), strict=True):
        waiting.append(token)
        text = str(tokenizer.decode(waiting, clean_up_tokenization_spaces=False))
        if not text.endswith("\ufffd"):
            yield text, token, learned
            waiting = []


def _refused(heading: str, rows: list[Problem]) -> tuple[str, tuple[str, ...], list[Problem]]:
    return heading, (_("row"), _("reason"), _("rule"), _("content")), rows
