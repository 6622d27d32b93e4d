"""Prepare data: read the recipe's sources; write documents, dialogues, held-out and rejected rows, and the ledger.

Each file is read and cleaned by itself. Then all files together are searched for duplicates, and a seeded part is held
out. Each row is either kept for the training stages or written to rejected.jsonl with the reason; rows that repeat
held-out data are rejected too. The steps on files run in this process, or as tasks of a datatrove pipeline.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from tongwen.core import artifact, console
from tongwen.core.i18n import _
from tongwen.data import prepare_steps
from tongwen.data.datatrove_executor import run_tasks
from tongwen.data.input_parts import KINDS, InputPart, list_parts
from tongwen.data.ledger import table_rows
from tongwen.hub.download import local_copy
from tongwen.recipe.data import Prepare


def prepare(section: Prepare, seed: int, settings: dict[str, Any], out: Path) -> artifact.Artifact:
    """Read and clean each file, compare all rows, decide on each row, join the files.

    settings: the settings that decide the result; they are recorded in the manifest.
    """
    console.header("prepare", _("read, clean, deduplicate and split the data"))
    with artifact.create(out, "prepare", {}, settings, resumable=True) as draft:
        parts = list_parts(section, local_copy, console.notice)
        _start(draft.path, parts, settings)
        run_tasks(
            section,
            "scan",
            draft.path,
            parts,
            lambda part: prepare_steps.scan(part, section, draft.path, console.notice),
        )
        scans = prepare_steps.read_scans(parts, draft.path)
        prepare_steps.check_readable(parts, scans, section.max_bad)
        for place, rule in [first for scan in scans for first in scan["first_bad"]][: prepare_steps.FIRST]:
            console.notice(f"{place}: {rule}")
        with console.waiting(_("comparing all rows")):
            prepare_steps.compare(parts, section, seed, draft.path)
        run_tasks(
            section, "settle", draft.path, parts, lambda part: prepare_steps.settle(part, parts, section, draft.path)
        )
        tables = prepare_steps.join(parts, section, draft.path)
        changed: Counter[str] = Counter()
        for scan in scans:
            changed.update(scan["changed"])
        files = {str(part.file): _state(part.file) for part in parts}
        made = artifact.hash_files(draft.path)
        draft.fingerprint = artifact.fingerprint_hashes(made)
        draft.facts = {"ledger": tables, "changed": dict(changed), "sources": _sources(section), "files": files}
        draft.facts["made"] = made
    assert draft.artifact
    unread = {part.name: scan.get("unread", {}) for part, scan in zip(parts, scans, strict=True)}
    if notice := prepare_steps.describe_unread(unread):
        console.notice(notice)
    _report_ledger(tables, dict(changed))
    return draft.artifact


def _start(folder: Path, parts: list[InputPart], settings: dict[str, Any]) -> None:
    """Keep the finished work of an interrupted run only if it had the same settings and files; otherwise start over."""
    files = [[str(part.file), (found := part.file.stat()).st_size, found.st_mtime_ns] for part in parts]
    now = json.loads(json.dumps({**settings, "files": files}))
    file = folder / "parts" / "settings.json"
    if file.is_file() and json.loads(file.read_text(encoding="utf-8")) == now:
        console.notice(_("continuing the interrupted work"))
        return
    artifact.empty(folder)
    file.parent.mkdir()
    artifact.write_json(file, now)


def _state(file: Path) -> dict[str, Any]:
    found = file.stat()
    return {"bytes": found.st_size, "modified": found.st_mtime_ns, "sha256": artifact.hash_file(file)}


def _sources(section: Prepare) -> dict[str, Any]:
    return {
        kind: [
            source.model_dump(mode="json", include={"path", "weight", "share", "language"})
            for source in getattr(section, kind)
        ]
        for kind in KINDS
    }


def _report_ledger(tables: dict[str, Any], changed: dict[str, int]) -> None:
    """Print the ledger, and how many texts each rule repaired."""
    rows: list[tuple[Any, ...]] = []
    for name, table in tables.items():
        rows += table_rows(table, name, _("kept"))
        if table["held_out"]:
            label = _("of which held out") if table["from_training"] else _("held out, from a file")
            rows.append((f"    {label}", table["held_out"], ""))
    console.table((_("ledger"), _("rows"), _("bytes")), rows)
    if changed:
        mended = ", ".join(f"{name} {count:,}" for name, count in sorted(changed.items()))
        console.info(_("texts repaired: {mended}").format(mended=mended))
