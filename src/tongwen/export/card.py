"""Write a model card, `README.md`, from the stages' records: base, data, method, scores.

Every claim comes from a manifest. The card asks the author to add facts that are not recorded, such as a licence.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tongwen.core.artifact import Artifact, find, read_json


def make_card(title: str, model: Artifact) -> str:
    """Return the card of a finished model and of the stages that it was made from."""
    stages = ancestry(model)
    base: dict[str, Any] = next(
        (one.manifest["parents"]["base"] for one in reversed(stages) if "base" in one.manifest["parents"]), {}
    )
    named = str(base.get("path") or "")
    licence = licence_of(Path(named))
    head = ["library_name: transformers", "pipeline_tag: text-generation", "language: [zh]", "tags: [tongwen]"]
    head += [f"base_model: {named}"] if named and not Path(named).exists() else []
    head += [f"license: {licence}"] if licence else []
    parts = ["---", *head, "---", "", f"# {title}", ""]
    parts += ["## How it was made", "", "| stage | what | fingerprint |", "|---|---|---|"]
    parts += [f"| base | `{Path(named).name}` | `{str(base.get('fingerprint'))[:12]}` |"] if named else []
    parts += [f"| {one.kind} | {_method(one.manifest)} | `{one.fingerprint[:12]}` |" for one in reversed(stages)]
    parts += _section("Data", [line for one in reversed(stages) for line in _data(one.manifest)])
    parts += _section("Scores", [line for one in reversed(stages) for line in _scores(one)])
    parts += _section("Licence", [_about_licence(named, licence)])
    parts += _section("Run it", [f"`vllm serve {title}` · `python -m sglang.launch_server --model-path {title}`"])
    return "\n".join(parts) + "\n"


def ancestry(model: Artifact) -> list[Artifact]:
    """Return the model and the stages before it, nearest first, as far as their folders still exist."""
    out = [model]
    for parent in model.manifest.get("parents", {}).values():
        above = find(Path(parent["path"])) if parent.get("kind") else None
        if above is not None and above.fingerprint == parent.get("fingerprint"):
            out += [one for one in ancestry(above) if one.path not in {seen.path for seen in out}]
    return out


def _method(manifest: Mapping[str, Any]) -> str:
    settings = manifest.get("settings", {})
    section = settings.get(str(manifest["kind"])) or settings.get("merge") or {}
    adapter = section.get("adapter", {})
    rank = adapter.get("rank")  # an adapter that is trained further keeps its own, and its settings name none
    parts = [adapter.get("method"), f"rank {rank}" if rank else None]
    parts += [
        f"{key} {section[key]}" for key in ("template", "learning_rate", "stop_after", "dtype") if section.get(key)
    ]
    parts += [f"{manifest['steps']} steps, {manifest['tokens']:,} tokens"] if "steps" in manifest else []
    parts += ["merged against its lineage by --force"] if manifest.get("forced") else []
    return ", ".join(str(part) for part in parts if part)


def _data(manifest: Mapping[str, Any]) -> list[str]:
    tables = manifest.get("ledger", {})
    return [
        f"{kind}: {table['in']['rows']:,} rows read, {table['kept']['rows']:,} kept, {table.get('held_out', 0):,} held out"
        for kind, table in (tables.items() if isinstance(tables, dict) else ())
    ]


def _scores(stage: Artifact) -> list[str]:
    file = stage.path / "report.json"
    score = read_json(file).get("held_out", {}) if file.is_file() else {}
    bits = score.get("bits_per_byte") or {}
    if not bits:
        return []
    return [
        f"held-out bits per byte ({stage.kind}, {score['samples']} samples): {bits['before']:.3f} → {bits['after']:.3f}"
    ]


def licence_of(base: Path) -> str:
    """Return the licence in the base's own card; "" without one."""
    card = base / "README.md"
    found = re.search(r"^license:\s*(\S+)", card.read_text(encoding="utf-8"), re.MULTILINE) if card.is_file() else None
    return found[1] if found else ""


def _about_licence(base: str, licence: str) -> str:
    name = Path(base).name or "the base"
    if licence:
        return f"`{name}` is under {licence}; this model is bound by it and by the terms of its data."
    return f"Not recorded. Before publishing, add the licence of `{name}` and check the terms of the data."


def _section(title: str, lines: Sequence[str]) -> list[str]:
    return ["", f"## {title}", "", *(f"* {line}" for line in lines)] if lines else []
