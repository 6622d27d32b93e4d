"""fetch: download a data set, a model or an adapter by name into a verified folder with a manifest.

The name is looked up (hub/names.yaml) or taken as the hub's id; every file is fetched, compared with the hub's hash and
put in its place; an interrupted download resumes where it stopped. A data set may be split: the rows of each JSON file are
shuffled with the seed, and the last share of them is the dev part, as BELLE's downloader did. Only the positions of the
rows are held in memory, and each row is copied byte for byte.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import random
import re
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tongwen.core import artifact, console
from tongwen.core.errors import DataError, RecipeError
from tongwen.core.i18n import _
from tongwen.hub import download, names

ROW_SUFFIXES = (".json", ".jsonl", ".ndjson")
KINDS = {"dataset": "data", "model": "models"}  # kind -> its default folder
TOKENS = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"|[\[\]{},]', re.DOTALL)  # a whole string, or a structural character


def run(
    name: str,
    out: str = "",
    *,
    dev: float = 0.0,
    seed: int = 42,
    old_names: bool = False,
    revision: str = "",
    kind: str = "",
    files: Sequence[str] = (),
    code: bool = False,
    again: bool = False,
) -> int:
    """Fetch one name, or list the known names if it is empty."""
    if not name.strip():
        return _list_names()
    ref = names.resolve(name, console.notice, kind=kind, revision=revision)
    ref = replace(ref, files=tuple(files) or ref.files, code=code)
    ref, place = _resolve_target(ref, out)
    console.header("fetch", f"{ref.source} → {place}")
    _check_split(ref, dev, old_names)

    def split(draft: artifact.Draft, paths: list[str]) -> None:
        draft.facts["made"] = split_files(draft.path, paths, dev, seed, old_names=old_names)

    found, already_fetched = download.fetch(
        ref,
        place,
        console.notice,
        settings={"dev": dev, "seed": seed, "old_names": old_names} if dev else {},
        complete=split if dev else None,
        again=again,
    )
    _report(found, already_fetched)
    return 0


def split_files(
    folder: Path, paths: Iterable[str], share: float, seed: int, *, old_names: bool = False
) -> dict[str, dict[str, Any]]:
    """Write NAME.train.jsonl and NAME.dev.jsonl beside each JSON file; return path -> bytes, sha256 and rows of the new files.

    Raises DataError if no file has rows.
    """
    paths = list(paths)
    made: dict[str, dict[str, Any]] = {}
    for path in paths:
        if not path.lower().endswith(ROW_SUFFIXES) or not (folder / path).stat().st_size:
            continue
        with (folder / path).open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
            starts, ends = _find_rows(content, path)
            if len(starts) < 2:
                console.notice(_("{path} has no rows to split").format(path=path))
                continue
            order = array("Q", range(len(starts)))
            random.Random(seed).shuffle(order)  # noqa: S311 (no secret)
            cut = len(order) - min(max(round(share * len(order)), 1), len(order) - 1)
            for part, chosen in (("train", order[:cut]), ("dev", order[cut:])):
                target = _part_name(path, part, {*made, *paths}, old_names)
                rows = (content[starts[row] : ends[row]] for row in chosen)
                made[target] = _write_rows(folder / target, rows)
                console.info(_("{target}: {count:,} rows").format(target=target, count=len(chosen)))
    if not made:
        raise DataError(
            _("--dev found no file with rows (JSON or JSON lines)"),
            place=str(folder),
            remedy=_("fetch without --dev; a recipe can split with held_out: 0.01"),
        )
    return made


def _part_name(path: str, part: str, taken: set[str], old_names: bool) -> str:
    suffix = "json" if old_names else "jsonl"
    name = f"{path[: path.rindex('.')]}.{part}.{suffix}"
    return name if name not in taken else f"{path}.{part}.{suffix}"


def _write_rows(file: Path, rows: Iterable[bytes]) -> dict[str, Any]:
    """Write one row per line. Line breaks inside a row can be replaced, because JSON strings contain none."""
    digest, count, size = hashlib.sha256(), 0, 0
    with file.open("wb") as stream:
        for row in rows:
            line = re.sub(rb"\s*[\r\n]\s*", b" ", row) + b"\n"
            stream.write(line)
            digest.update(line)
            count, size = count + 1, size + len(line)
    return {"bytes": size, "sha256": digest.hexdigest(), "rows": count}


def _find_rows(content: mmap.mmap, path: str) -> tuple[array[int], array[int]]:
    """Return where the rows of a JSON array or of JSON lines begin and end; nothing for a file that is one object."""
    start = 3 if content[:3] == b"\xef\xbb\xbf" else 0
    first = re.compile(rb"\S").search(content, start)
    if first and first[0] == b"[":
        found: Iterator[tuple[int, int]] = _iter_elements(content, first.start(), path)
    elif first and _is_object(content, first.start()):
        found = _iter_lines(content, first.start())
    else:
        found = iter(())
    starts, ends = array("Q"), array("Q")
    for begin, end in found:
        starts.append(begin)
        ends.append(end)
    return starts, ends


def _is_object(content: mmap.mmap, start: int) -> bool:
    """Return whether the first line is a whole object; if not, the file is one object, such as a configuration."""
    end = content.find(b"\n", start)
    try:
        return isinstance(json.loads(content[start : end if end >= 0 else len(content)]), dict)
    except (ValueError, RecursionError):
        return False


def _iter_lines(content: mmap.mmap, start: int) -> Iterator[tuple[int, int]]:
    while start < len(content):
        end = content.find(b"\n", start)
        end = end if end >= 0 else len(content)
        if row := content[start:end].strip():
            begin = content.find(row[:1], start)
            yield begin, begin + len(row)
        start = end + 1


def _iter_elements(content: mmap.mmap, start: int, path: str) -> Iterator[tuple[int, int]]:
    depth, begin = 0, start + 1
    for token in TOKENS.finditer(content, start):
        mark = token[0]
        if mark in (b"[", b"{"):
            depth += 1
        elif mark in (b"]", b"}"):
            depth -= 1
        if (depth == 1 and mark == b",") or depth == 0:
            end = token.start()
            row = content[begin:end]
            if bare := row.strip():
                first = begin + len(row) - len(row.lstrip())
                yield first, first + len(bare)
            begin = token.end()
        if depth == 0:
            break
    if depth or content[begin:].strip():
        raise DataError(
            _("this is not one complete JSON array"),
            place=path,
            remedy=_("fetch without --dev, and look at the end of the file"),
        )


def _check_split(ref: names.HubRef, dev: float, old_names: bool) -> None:
    if not dev and old_names:
        raise RecipeError(
            _("--old-names only names the files that --dev makes"),
            place="--old-names",
            remedy="--dev 0.01 --old-names",
        )
    if dev and ref.kind != "dataset":
        raise RecipeError(
            _("only a data set can be split; {wanted} is a model").format(wanted=ref.id),
            place="--dev",
        )
    if dev and not 0 < dev < 1:
        raise RecipeError(
            _("{dev:g} is not a share between 0 and 1").format(dev=dev),
            place="--dev",
            remedy="--dev 0.01",
        )


def _resolve_target(ref: names.HubRef, out: str) -> tuple[names.HubRef, Path]:
    """Return `ref` with its kind, and its folder. A folder that was fetched before gives the kind without asking the hub."""
    places = [Path(out)] if out else [Path(parent) / ref.tail for parent in KINDS.values()]
    for place in places:
        found = artifact.find(place) if not ref.kind else None
        if found is not None and found.kind == download.KIND and found.manifest["settings"].get("source") == ref.source:
            return replace(ref, kind=found.manifest["settings"]["kind"]), place
    ref = download.with_kind(ref, console.notice)
    return ref, Path(out) if out else Path(KINDS[ref.kind]) / ref.tail


def _report(found: artifact.Artifact, already_fetched: bool) -> None:
    files, made = found.manifest["files"], found.manifest.get("made", {})
    size = console.human_bytes(sum(file["bytes"] for file in files.values()))
    commit = found.manifest["source"]["commit"][:12]
    console.success(
        _("already here: {path}").format(path=found.path)
        if already_fetched
        else _("{path}: {count} files, {size}, commit {commit}, all hashes agree").format(
            path=found.path, count=len(files), size=size, commit=commit
        )
    )
    console.info("  → " + _next_step(found, [*made] or [*files]))
    console.emit(
        {
            "out": str(found.path),
            "already_here": already_fetched,
            **found.manifest["source"],
            "files": files,
            "made": made,
        }
    )


def _next_step(found: artifact.Artifact, files: list[str]) -> str:
    """Return the recipe line, or the command, that uses the fetched folder."""
    if found.manifest["source"]["kind"] == "dataset":
        rows = [f"{found.path}/{name}" for name in files if name.lower().endswith(ROW_SUFFIXES)]
        train = [name for name in rows if ".train.json" in name] or rows or [str(found.path)]
        dev = [name for name in rows if ".dev.json" in name]
        held_out = f", held_out: {dev[0]}" if len(dev) == 1 else ""
        return f"prepare: {{dialogues: [{', '.join(train)}]{held_out}}}"
    if (found.path / "adapter_config.json").is_file():
        return f"tongwen merge --base {_base_of(found.path)} --adapter {found.path} --out {found.path}-merged"
    return f"base: {found.path}"


def _base_of(adapter: Path) -> str:
    """Return the current id of the base that an adapter names."""
    try:
        config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
        base = str(config["base_model_name_or_path"])
    except (ValueError, KeyError, TypeError):
        return "BASE"
    return names.current_id(base) if names.is_id(base) else "BASE"


def _list_names() -> int:
    table = names.names()
    console.table(
        (_("name"), _("kind"), "hub", "ModelScope"),
        [(key, entry["kind"], entry["hub"], entry.get("modelscope", "")) for key, entry in table.items()],
    )
    console.info("\ntongwen fetch belle-1m --dev 0.01")
    console.emit({"names": table})
    return 0
