"""check: the recipe and all its data are read as `prepare` would, and nothing is written. No model, no torch."""

from __future__ import annotations

from typing import Any

from tongwen import console
from tongwen.data.ledger import Ledger
from tongwen.data.read import Rejected, check_losses, read_dialogues, read_documents
from tongwen.data.split import hold_out
from tongwen.errors import DataError, TongwenError, raise_all
from tongwen.language import say
from tongwen.recipe.schema import Recipe, Source


def run(recipe: Recipe) -> int:
    """Report what `prepare` would keep, and every problem of the data at once."""
    console.header("check", recipe.name)
    errors: list[TongwenError] = []
    tables = {}
    for name in ("dialogues", "documents"):
        sources = getattr(recipe.prepare, name, []) if recipe.prepare else []
        if not sources:
            continue
        try:
            tables[name] = _read(recipe, name, sources)
        except DataError as error:
            errors.append(error)
    raise_all(errors)
    rows = [
        (
            f"{name}: {say('in', '读入')}" if part == "in" else f"  = {say('kept', '保留')}",
            table[part]["rows"],
            table[part]["bytes"],
        )
        for name, table in tables.items()
        for part in ("in", "kept")
    ]
    console.table((say("data", "数据"), say("rows", "行"), say("bytes", "字节")), rows)
    console.good(say(f"stages: {', '.join(recipe.stages)}", f"阶段：{'、'.join(recipe.stages)}"))
    console.emit({"name": recipe.name, "stages": recipe.stages, "data": tables})
    return 0


def _read(recipe: Recipe, name: str, sources: list[Source]) -> dict[str, Any]:
    assert recipe.prepare
    section = recipe.prepare
    ledger, rejected = Ledger("rows", "bytes"), list[Rejected]()
    if name == "dialogues":
        records = list(read_dialogues(sources, section.fill, ledger, rejected.append))
        if isinstance(section.held_out, str):
            list(
                read_dialogues([Source(path=section.held_out)], section.fill, Ledger("rows", "bytes"), rejected.append)
            )
        else:
            hold_out(records, section.held_out, recipe.seed)
    else:
        list(read_documents(sources, ledger, rejected.append))
    check_losses(ledger, rejected, section.max_bad, name)
    for bad in rejected[:3]:
        console.notice(f"{bad.origin}: {bad.rule}")
    return {**ledger.to_dict(), "rejected": len(rejected)}
