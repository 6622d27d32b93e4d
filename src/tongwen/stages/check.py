"""check: the recipe and all its data are read and cleaned as `prepare` would, and nothing is written. No model, no torch."""

from __future__ import annotations

import numpy as np

from tongwen import console
from tongwen.data import parts as steps
from tongwen.data.clean import Cleaner, Dropped
from tongwen.data.ledger import Ledger, table_rows
from tongwen.data.mix import choose_held_out
from tongwen.errors import DataError, RowRefused, TongwenError, raise_all
from tongwen.hub.fetching import local_copy
from tongwen.language import say
from tongwen.recipe.schema import Prepare, Recipe


def run(recipe: Recipe) -> int:
    """Report what `prepare` would keep before it compares the rows, and every problem of the data at once."""
    console.header("check", recipe.name)
    errors: list[TongwenError] = []
    tables = {}
    section = recipe.prepare
    all_parts = steps.list_parts(section, local_copy, console.notice, errors) if section else []
    for kind in steps.KINDS:
        parts = [part for part in all_parts if part.kind == kind]
        if not parts:
            continue
        assert section
        try:
            ledger, bad = _read(parts, section, errors)
            if not errors:
                if not isinstance(section.held_out, str):
                    everything = np.ones(ledger.kept, bool)
                    choose_held_out(everything, section.held_out, recipe.seed, section.held_out_at_most)
                tables[kind] = {**ledger.to_dict(), "rejected": bad}
        except DataError as error:
            errors.append(error)
    raise_all(errors)
    rows = [row for kind, table in tables.items() for row in table_rows(table, kind, say("kept", "保留"))]
    console.table((say("data", "数据"), say("rows", "行"), say("bytes", "字节")), rows)
    console.good(say(f"stages: {', '.join(recipe.stages)}", f"阶段：{'、'.join(recipe.stages)}"))
    console.emit({"name": recipe.name, "stages": recipe.stages, "data": tables})
    return 0


def _read(parts: list[steps.Part], section: Prepare, errors: list[TongwenError]) -> tuple[Ledger, int]:
    """The ledger of the training files of one kind, and how many of their rows are unreadable."""
    whole, all_bad = Ledger("rows", "bytes"), 0
    for role in ("held_out", "evaluation", "train"):
        ledger, bad = Ledger("rows", "bytes"), list[tuple[str, str]]()
        for part in (one for one in parts if one.role == role):
            try:
                for raw, record in steps.iter_rows(part, section, Cleaner(section.clean, part.kind), console.notice):
                    ledger.enter(raw.size)
                    if isinstance(record, (Dropped, RowRefused)):
                        ledger.lose(record.reason, raw.size)
                        if isinstance(record, RowRefused):
                            bad.append((f"{raw.file}:{raw.row}", record.rule))
                    else:
                        ledger.keep(raw.size)
            except DataError as error:
                errors.append(error)
        if ledger.things_in:
            steps.check_losses(
                ledger.things_in, ledger.kept, len(bad), bad[: steps.FIRST], section.max_bad, parts[0].kind
            )
        for place, rule in bad[:3]:
            console.notice(f"{place}: {rule}")
        if role == "train":
            whole, all_bad = ledger, len(bad)
    return whole, all_bad
