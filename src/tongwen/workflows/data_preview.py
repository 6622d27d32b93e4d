"""Preview data before using it: a file's format, the rows that fail and why, and the tokens that would be learned.

`look` shows samples of a recipe, the web page shows samples of a file; both colour them with `coloured`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tongwen.core import console
from tongwen.core.errors import RowRejected
from tongwen.core.html import render
from tongwen.core.i18n import _
from tongwen.core.records import Record
from tongwen.data import formats, prepare_steps, token_store
from tongwen.data.clean import Cleaner, RejectedText
from tongwen.data.input_parts import InputPart, kind_of, raw_rows
from tongwen.data.ledger import Ledger, RejectedRow, table_rows
from tongwen.data.token_store import TokenStore
from tongwen.recipe.data import Prepare, SourceConfig
from tongwen.recipe.training import Pretrain, Sft
from tongwen.workflows.record_encoders import RecordEncoder, make_dialogue_encoder, make_document_encoder
from tongwen.workflows.tokenized_data import describe_mask

SHOWN, ENCODED, PROBLEMS = 5, 200, 100  # samples that are shown, samples that are encoded, rows that are listed
EXCERPT = 160  # characters of a row


Problem = tuple[int, str, str, str]  # row, reason, rule, the row itself


@dataclass
class DataPreview:
    """A file's format and counts, its first usable rows, and its first rows with problems."""

    kind: str
    format: str
    counts: prepare_steps.ScanCounts
    problems: list[Problem] = field(default_factory=list)
    records: list[Record] = field(default_factory=list)


def inspect(file: Path) -> DataPreview:
    """Read a whole file as `prepare` would, without the search for duplicates. Raises DataError for other files."""
    source = SourceConfig(path=str(file))
    kind = kind_of(file, source)
    section = Prepare.model_validate({kind: [source]})
    part = InputPart(0, kind, "train", 0, source, file)
    first = next(raw_rows(part, lambda text: None))
    name = "text" if kind == "documents" else formats.recognise_row(first, source)
    found = DataPreview(kind, name, prepare_steps.ScanCounts())
    for raw, record in prepare_steps.iter_rows(part, section, Cleaner(section.clean, kind), lambda text: None):
        found.counts.count(raw, record)
        if not isinstance(record, (RejectedText, RowRejected)):
            if len(found.records) < ENCODED:
                found.records.append(record)
        elif len(found.problems) < PROBLEMS:
            excerpt = raw.value if isinstance(raw.value, str) else json.dumps(raw.value, ensure_ascii=False)
            found.problems.append((raw.row, record.reason, record.rule, excerpt[:EXCERPT]))
    return found


def as_html(found: DataPreview) -> str:
    """Return counts, ledger and problems as an HTML fragment."""
    ledger = found.counts.ledger
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
    """Return the first records as HTML, encoded for a model, with learned tokens coloured. Opens only its tokenizer."""
    record_encoder: RecordEncoder
    if found.kind == "documents":
        record_encoder = make_document_encoder(base, Pretrain())
        stop = record_encoder.end
    else:
        record_encoder = dialogues = make_dialogue_encoder(base, Sft(template=template))
        stop = int(dialogues.tokenizer.convert_tokens_to_ids(dialogues.template.stop))
    rejected: list[RejectedRow] = []
    store = token_store.in_memory(
        record_encoder.batches(iter(found.records), Ledger("rows", "tokens"), rejected.append)
    )
    lost = [(bad.origin.row, bad.reason, bad.rule, "") for bad in rejected]
    summary, samples = "", []
    if len(store):
        first = _("Of the first {count} rows: ").format(count=len(found.records))
        summary = first + describe_mask(record_encoder.check(store, []))
        for index in range(min(SHOWN, len(store))):
            row, length = store.origin(index).row, store.lengths[index]
            heading = _("row {row} · {length} tokens").format(row=row, length=length)
            samples.append((heading, coloured(record_encoder.tokenizer, store, index, stop)))
    return render(
        "workflows/samples.html.jinja",
        refused=_refused(_("Rows that this model does not use"), lost),
        summary=summary,
        kinds=token_kinds(),
        samples=samples,
    )


def token_kinds() -> list[tuple[str, str]]:
    """Return (kind, meaning) of the kinds that `coloured` gives."""
    return [
        ("p", _("prompt")),
        ("l", _("learned")),
        ("s", _("stop token, learned")),
    ]


def coloured(tokenizer: Any, store: TokenStore, index: int, stop: int) -> list[tuple[str, int, str]]:
    """Return (text, last id, kind) of each piece of a sample. Kinds: `p` prompt, `l` learned, `s` learned stop."""
    return [
        (text, token, ("s" if token == stop else "l") if learned else "p")
        for text, token, learned in pieces(tokenizer, store, index)
    ]


def pieces(tokenizer: Any, store: TokenStore, index: int) -> Iterator[tuple[str, int, bool]]:
    """Yield (text, last id, learned) of a sample's pieces; tokens of one character are one piece."""
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
