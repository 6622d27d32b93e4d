"""prepare: the recipe's sources in; documents, dialogues and what was held out and rejected out, with the ledger.

Each source is read row by row. A row becomes a record or stands in rejected.jsonl with its reason. A seeded part is
held out. What is kept is what the training stages take in.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tongwen import artifact, console
from tongwen.data.ledger import Ledger
from tongwen.data.read import Rejected, check_losses, read_dialogues, read_documents
from tongwen.data.split import hold_out
from tongwen.language import say
from tongwen.recipe.schema import Prepare, Recipe, Source
from tongwen.record import Dialogue, Document


def settings(recipe: Recipe) -> dict[str, Any]:
    """What decides this stage's result: a change of any of it asks for `--again`."""
    assert recipe.prepare
    return {"prepare": recipe.prepare.model_dump(mode="json"), "seed": recipe.seed}


def run(recipe: Recipe, out: Path) -> artifact.Artifact:
    """Read, check, split, write."""
    section = recipe.prepare
    assert section
    console.header("prepare", say("read, check and split the data", "读取、检查、划分数据"))
    rejected: list[Rejected] = []
    with artifact.create(out, "prepare", {}, settings(recipe)) as draft:
        tables: dict[str, Any] = {}
        if section.dialogues:
            tables["dialogues"] = _write(draft.path, "dialogues", *_dialogues(section, rejected, recipe.seed))
            tables["dialogues"]["from_training"] = not isinstance(section.held_out, str)
        if section.documents:
            tables["documents"] = _write(draft.path, "documents", *_documents(section, rejected, recipe.seed))
        _write_lines(draft.path / "rejected.jsonl", (bad.to_dict() for bad in rejected))
        draft.facts = {"ledger": tables}
    assert draft.artifact
    _show(tables)
    return draft.artifact


def _dialogues(section: Prepare, rejected: list[Rejected], seed: int) -> tuple[Ledger, list[Dialogue], list[Dialogue]]:
    ledger, bad = Ledger("rows", "bytes"), len(rejected)
    records = list(read_dialogues(section.dialogues, section.fill, ledger, rejected.append))
    check_losses(ledger, rejected[bad:], section.max_bad, say("dialogues", "对话"))
    if isinstance(section.held_out, str):
        aside = Ledger("rows", "bytes")
        source = Source(path=section.held_out)
        return ledger, records, list(read_dialogues([source], section.fill, aside, rejected.append))
    return ledger, *hold_out(records, section.held_out, seed)


def _documents(section: Prepare, rejected: list[Rejected], seed: int) -> tuple[Ledger, list[Document], list[Document]]:
    ledger, bad = Ledger("rows", "bytes"), len(rejected)
    records = list(read_documents(section.documents, ledger, rejected.append))
    check_losses(ledger, rejected[bad:], section.max_bad, say("documents", "文档"))
    if isinstance(section.held_out, str):
        return ledger, records, []
    return ledger, *hold_out(records, section.held_out, seed)


def _write(folder: Path, name: str, ledger: Ledger, kept: list[Any], held_out: list[Any]) -> dict[str, Any]:
    _write_lines(folder / f"{name}.jsonl", map(_to_dict, kept))
    if held_out:
        _write_lines(folder / f"{name}.held_out.jsonl", map(_to_dict, held_out))
    return {**ledger.to_dict(), "train": len(kept), "held_out": len(held_out)}


def _to_dict(record: Dialogue | Document) -> dict[str, Any]:
    if isinstance(record, Dialogue):
        return record.to_dict()
    return {"text": record.text, "origin": {"file": record.origin.file, "row": record.origin.row}}


def _write_lines(file: Path, rows: Iterable[dict[str, Any]]) -> None:
    with file.open("w", encoding="utf-8") as stream:
        for row in rows:
            stream.write(json.dumps(row, ensure_ascii=False) + "\n")


def _show(tables: dict[str, Any]) -> None:
    rows = []
    for name, table in tables.items():
        rows.append((f"{name}: {say('in', '读入')}", table["in"]["rows"], table["in"]["bytes"]))
        rows += [(f"  − {reason}", lost["rows"], lost["bytes"]) for reason, lost in table["lost"].items()]
        rows.append((f"  = {say('kept', '保留')}", table["kept"]["rows"], table["kept"]["bytes"]))
        rows.append((f"    {say('of these held out', '其中留出')}", table["held_out"], ""))
    console.table((say("ledger", "账目"), say("rows", "行"), say("bytes", "字节")), rows)
