"""Sources of the recipe become one stream of records; every row that is not taken is handed over with its reason."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tongwen.data import formats
from tongwen.data.ledger import Ledger
from tongwen.data.sources import RawRow, find_files, read_rows
from tongwen.errors import DataError, RowRefused
from tongwen.language import say
from tongwen.recipe.schema import Source
from tongwen.record import Dialogue, Document, Message, Origin


@dataclass(frozen=True)
class Rejected:
    """A row that was not taken, as it stands in rejected.jsonl."""

    origin: Origin
    reason: str
    rule: str
    value: Any

    def to_dict(self) -> dict[str, Any]:
        return {
            "file": self.origin.file,
            "row": self.origin.row,
            "reason": self.reason,
            "rule": self.rule,
            "value": self.value,
        }


def read_dialogues(
    sources: Sequence[Source], fill: Mapping[str, str], ledger: Ledger, reject: Callable[[Rejected], None]
) -> Iterator[Dialogue]:
    """All dialogues of the sources, in their order. Counts every row in the ledger."""
    for source in sources:
        for file in find_files(source.path):
            format_: str | None = source.format
            for raw in read_rows(file):
                if format_ in (None, "text") and not raw.problem:
                    format_ = _recognised(raw, source)
                arguments = (format_ or "messages", source.columns, fill)
                if (record := _take(raw, ledger, reject, formats.read_dialogue, *arguments)) is not None:
                    yield record


def read_documents(sources: Sequence[Source], ledger: Ledger, reject: Callable[[Rejected], None]) -> Iterator[Document]:
    """All documents of the sources, in their order. Counts every row in the ledger."""
    for source in sources:
        for file in find_files(source.path):
            for raw in read_rows(file):
                if (record := _take(raw, ledger, reject, formats.read_document, source.columns)) is not None:
                    yield record


def check_losses(ledger: Ledger, rejected: Sequence[Rejected], max_bad: float | None, what: str) -> None:
    """Raise DataError when nothing is left, or more rows were rejected than the recipe allows."""
    if ledger.things_in and not ledger.kept:
        first = rejected[0]
        raise DataError(
            say(
                f"none of the {ledger.things_in} {what} can be used; the first: {first.rule}",
                f"{ledger.things_in} 行{what}全部不可用；第一行：{first.rule}",
            ),
            place=str(first.origin),
            remedy=say(
                "name the format or the columns in the recipe: {path: …, format: alpaca, columns: {output: answer}}",
                "在配方中写明格式或列名：{path: …, format: alpaca, columns: {output: answer}}",
            ),
        )
    allowed = (
        min(100.0, 0.001 * ledger.things_in) if max_bad is None else max_bad * (ledger.things_in if max_bad < 1 else 1)
    )
    if len(rejected) > allowed:
        shown = "\n".join(f"    {bad.origin}: {bad.rule}" for bad in rejected[:5])
        more = f"\n    … {len(rejected) - 5}" if len(rejected) > 5 else ""
        raise DataError(
            say(
                f"{len(rejected)} of {ledger.things_in} rows cannot be used, more than the {allowed:g} allowed:\n{shown}{more}",
                f"{ledger.things_in} 行中有 {len(rejected)} 行不可用，超过允许的 {allowed:g} 行：\n{shown}{more}",
            ),
            place=rejected[0].origin.file,
            remedy=say(
                f"mend them, or allow it: prepare: {{max_bad: {len(rejected)}}}",
                f"请修正，或允许：prepare: {{max_bad: {len(rejected)}}}",
            ),
        )


def load_dialogues(file: Path) -> Iterator[Dialogue]:
    """The dialogues that a prepare stage wrote."""
    with file.open(encoding="utf-8") as stream:
        for line in stream:
            row = json.loads(line)
            messages = tuple(
                Message(
                    turn["role"],
                    turn["content"],
                    turn.get("reasoning_content"),
                    tuple(turn.get("tool_calls", ())),
                    turn.get("learn"),
                )
                for turn in row["messages"]
            )
            origin = Origin(row["origin"]["file"], row["origin"]["row"])
            yield Dialogue(messages, origin, tuple(row.get("tools", ())), row.get("meta", {}))


def _recognised(raw: RawRow, source: Source) -> str:
    row = raw.value
    if isinstance(row, dict):
        row = {**row, **{ours: row[theirs] for ours, theirs in source.columns.items() if theirs in row}}
    found = formats.recognise(row)
    if found is None or found == "text":
        keys = ", ".join(raw.value) if isinstance(raw.value, dict) else type(raw.value).__name__
        raise DataError(
            say(f"this row is no dialogue of a known format; it has: {keys}", f"该行不是已知格式的对话；现有：{keys}"),
            place=f"{raw.file}:{raw.row}",
            remedy=say(
                "name the columns in the recipe: {path: …, columns: {instruction: YOUR_QUESTION, output: YOUR_ANSWER}}",
                "在配方中写明列名：{path: …, columns: {instruction: 你的问题列, output: 你的回答列}}",
            ),
        )
    return found


def _take(
    raw: RawRow, ledger: Ledger, reject: Callable[[Rejected], None], read: Callable[..., Any], *arguments: Any
) -> Any:
    """The record of a row, or None when it was refused; either way it stands in the ledger."""
    ledger.enter(raw.size)
    origin = Origin(raw.file, raw.row)
    try:
        if raw.problem:
            raise RowRefused(raw.reason, raw.problem)
        record = read(raw.value, *arguments, origin)
    except RowRefused as error:
        ledger.lose(error.reason, raw.size)
        reject(Rejected(origin, error.reason, error.rule, raw.value))
        return None
    except DataError as error:
        raise DataError(error.rule, place=str(origin), remedy=error.remedy) from None
    ledger.keep(raw.size)
    return record
