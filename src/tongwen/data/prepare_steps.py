"""The steps of data preparation. Each works on one file, so that one process or a hundred tasks give the same result.

`scan` reads and cleans a file; `compare` finds duplicates across all files and chooses the held-out records; `settle` writes
the kept and the lost records; `join` concatenates the files in order. The steps exchange folders (`parts/00003/`), and a
finished step is not repeated. Results depend on the files and the recipe only, never on the assignment of parts to tasks.
"""

from __future__ import annotations

import json
import shutil
import struct
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from tongwen.core import artifact
from tongwen.core.errors import DataError, RowRejected
from tongwen.core.i18n import _
from tongwen.core.records import Origin, Record, from_dict
from tongwen.data import dedup, formats, preference_rows
from tongwen.data.clean import Cleaner, RejectedText
from tongwen.data.input_parts import KINDS, InputPart, Notify, raw_rows
from tongwen.data.ledger import Ledger, RejectedRow
from tongwen.data.office_files import UNREADABLE
from tongwen.data.row import RawRow
from tongwen.data.sampling import choose_held_out
from tongwen.recipe.data import Prepare

KEPT, SAME, NEAR, HELD_OUT = range(4)  # verdicts of `compare`
FIRST = 5  # unreadable rows shown in a message
SHOWN = 20  # unread fields shown in a message


# -- one file ------------------------------------------------------------------------------------------------------


def iter_rows(
    part: InputPart, section: Prepare, cleaner: Cleaner, notify: Notify
) -> Iterator[tuple[RawRow, Record | RejectedText | RowRejected]]:
    """Yield every row of a file with its record, or with the reason why it has none."""
    known = part.source.format
    for raw in raw_rows(part, notify):
        origin = Origin(raw.file, raw.row)
        try:
            if raw.problem:
                raise RowRejected(raw.reason, raw.problem)
            record: Record
            if part.kind == "documents":
                record = formats.read_document(raw.value, part.source, origin)
            elif part.kind == "preferences":
                record = preference_rows.read_preference(raw, part.source, section.fill)
            else:
                format_ = known or formats.recognise_row(raw, part.source)
                record = formats.read_dialogue(raw.value, format_, part.source, section.fill, origin)
        except RowRejected as refused:
            yield raw, refused
        except DataError as error:
            raise DataError(error.rule, place=error.place or str(origin), remedy=error.remedy) from None
        else:
            yield raw, cleaner.clean(record)


def iter_records(
    parts: Sequence[InputPart], section: Prepare, kind: str, notify: Notify, counts: ScanCounts
) -> Iterator[Record]:
    """Yield the readable, cleaned training records of a kind before deduplication, for previews; count all rows."""
    for part in parts:
        if part.kind == kind and part.role == "train":
            for raw, record in iter_rows(part, section, Cleaner(section.clean, kind), notify):
                counts.count(raw, record)
                if not isinstance(record, (RejectedText, RowRejected)):
                    yield record


@dataclass
class ScanCounts:
    """Counts of scanned rows: the ledger, the number of unreadable rows, the first of them as (place, rule), and the kept
    rows with a field that nothing reads: {file: {field: rows}}. A scanned page or a locked document is normal among many, and
    not counted as an unreadable row."""

    ledger: Ledger = field(default_factory=lambda: Ledger("rows", "bytes"))
    bad: int = 0
    first_bad: list[tuple[str, str]] = field(default_factory=list)
    unread: dict[str, Counter[str]] = field(default_factory=dict)

    def count(self, raw: RawRow, record: Record | RejectedText | RowRejected) -> None:
        self.ledger.enter(raw.size)
        if not isinstance(record, (RejectedText, RowRejected)):
            self.ledger.keep(raw.size)
            if record.unread:
                self.unread.setdefault(raw.file, Counter()).update(record.unread)
            return
        self.ledger.lose(record.reason, raw.size)
        if isinstance(record, RowRejected):
            self.bad += raw.reason not in UNREADABLE
            if len(self.first_bad) < FIRST:
                self.first_bad.append((f"{raw.file}:{raw.row}", record.rule))


INDEX = np.dtype([("digest", "<u8", 2), ("size", "<i8"), ("begin", "<i8"), ("near", "?")])
_INDEX = struct.Struct("<16sqq?")  # the same layout, to write one entry


def scan(part: InputPart, section: Prepare, out: Path, notify: Notify) -> None:
    """Read and clean one file into its folder: records, rejected rows, and an index for `compare`.

    index.bin: one INDEX entry per record; bands.bin: (n, BANDS) uint64 of the records in near deduplication.
    """
    folder = part.folder(out)
    if (folder / "scan.json").is_file():
        return
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    cleaner = Cleaner(section.clean, part.kind)
    wants_near = part.role == "train" and getattr(section.dedup, part.kind) == "near"
    tally, begin = ScanCounts(), 0
    with (
        (folder / "records.jsonl").open("wb") as records,
        (folder / "rejected.jsonl").open("wb") as rejected,
        (folder / "index.bin").open("wb") as index,
        (folder / "bands.bin").open("wb") as bands,
    ):
        for raw, record in iter_rows(part, section, cleaner, notify):
            tally.count(raw, record)
            if isinstance(record, (RejectedText, RowRejected)):
                origin = Origin(raw.file, raw.row)
                rejected.write(RejectedRow(origin, record.reason, record.rule, raw.value).to_line())
                continue
            line = as_line(record)
            folded = dedup.fold(dedup.text_of(record))
            near = wants_near and len(folded) >= section.dedup.min_chars
            index.write(_INDEX.pack(dedup.digest(folded), raw.size, begin, near))
            if near:
                bands.write(dedup.signature(folded).tobytes())
            records.write(line)
            begin += len(line)
    if not tally.ledger.items_in:
        raise DataError(_("no rows in this file"), place=part.name)
    facts = {
        "ledger": tally.ledger.to_dict(),
        "bad": tally.bad,
        "first_bad": tally.first_bad,
        "changed": dict(cleaner.changed),
        "unread": sum(tally.unread.values(), Counter()),
    }
    artifact.sync_tree(folder)
    artifact.write_json(folder / "scan.json", facts)


def as_line(record: Record) -> bytes:
    return json.dumps(record.to_dict(), ensure_ascii=False).encode() + b"\n"


def from_line(line: bytes) -> Record:
    return from_dict(json.loads(line))


def load_records(file: Path) -> Iterator[Record]:
    """Yield the records of a file that `scan`, `settle` or `join` wrote."""
    with file.open("rb") as stream:
        yield from map(from_line, stream)


def read_scans(parts: Sequence[InputPart], out: Path) -> list[dict[str, Any]]:
    return [json.loads((part.folder(out) / "scan.json").read_text(encoding="utf-8")) for part in parts]


def describe_unread(unread: Mapping[str, Mapping[str, int]]) -> str:
    """Return a notice on the fields that nothing reads, or "" without one. unread: {file: {field: rows}}."""
    total: Counter[str] = Counter()
    for counts in unread.values():
        total.update(counts)
    if not total:
        return ""
    names = [_("{name} ({count:,} rows)").format(name=name, count=count) for name, count in total.most_common(SHOWN)]
    shown = _(", ").join(names) + (f" … {len(total) - SHOWN}" if len(total) > SHOWN else "")
    files = [name for name, counts in unread.items() if counts]
    where = Path(files[0]).name if len(files) == 1 else _("{count} files").format(count=len(files))
    return _(
        "{where}: nothing reads these fields: {shown}; if that is right, list them at the source: ignore: […]"
    ).format(where=where, shown=shown)


def check_readable(parts: Sequence[InputPart], scans: Sequence[dict[str, Any]], max_bad: float | None) -> None:
    """Raise DataError when a kind has no rows left, or more unreadable rows than the recipe allows."""
    for kind, role in sorted({(part.kind, part.role) for part in parts}):
        chosen = [scan for part, scan in zip(parts, scans, strict=True) if (part.kind, part.role) == (kind, role)]
        check_losses(
            sum(scan["ledger"]["in"]["rows"] for scan in chosen),
            sum(scan["ledger"]["kept"]["rows"] for scan in chosen),
            sum(scan["bad"] for scan in chosen),
            [(place, rule) for scan in chosen for place, rule in scan["first_bad"]][:FIRST],
            max_bad,
            {"documents": _("documents"), "dialogues": _("dialogues"), "preferences": _("preferences")}[kind],
        )


def check_losses(
    rows: int, kept: int, bad: int, first_bad: Sequence[tuple[str, str]], max_bad: float | None, what: str
) -> None:
    """Raise DataError when no row is left, or more rows are unreadable than allowed."""
    if not kept:
        place, rule = first_bad[0] if first_bad else ("prepare.clean", _("all are filtered out"))
        raise DataError(
            _("none of the {rows} {what} can be used; the first: {rule}").format(rows=rows, what=what, rule=rule),
            place=place,
            remedy=_(
                "name the format or the columns in the recipe: {path: …, format: alpaca, columns: {output: answer}}"
            ),
        )
    allowed = min(100.0, 0.001 * rows) if max_bad is None else max_bad * (rows if max_bad < 1 else 1)
    if bad > allowed:
        shown = "\n".join(f"    {place}: {rule}" for place, rule in first_bad)
        more = f"\n    … {bad - len(first_bad)}" if bad > len(first_bad) else ""
        raise DataError(
            _("{bad} of {rows} rows cannot be used, more than the {allowed:g} allowed:\n{shown}{more}").format(
                bad=bad, rows=rows, allowed=allowed, shown=shown, more=more
            ),
            place=first_bad[0][0].rpartition(":")[0],
            remedy=_("fix them, or allow them: prepare: {{max_bad: {bad}}}").format(bad=bad),
        )


# -- all files together --------------------------------------------------------------------------------------------


def iter_index(folder: Path) -> Iterator[np.ndarray]:
    """Yield the INDEX entries of a part, in pieces."""
    with (folder / "index.bin").open("rb") as stream:
        while len(block := np.fromfile(stream, INDEX, 65536)):
            yield block


class RecordIndex:
    """The records of all training parts of one kind, numbered consecutively, on disk."""

    def __init__(self, parts: Sequence[InputPart], out: Path) -> None:
        self.parts, self.out = list(parts), out
        self.counts = [(part.folder(out) / "index.bin").stat().st_size // INDEX.itemsize for part in parts]
        self.starts = np.concatenate([[0], np.cumsum(self.counts)]).astype(np.int64)

    def __len__(self) -> int:
        return int(self.starts[-1])

    def blocks(self, name: str) -> Iterator[np.ndarray]:
        """Yield one column of all indices, in pieces."""
        for part in self.parts:
            yield from (block[name].copy() for block in iter_index(part.folder(self.out)))

    def near(self) -> np.ndarray:
        """Return (n,) int64: the numbers of the records in near deduplication."""
        return np.flatnonzero(np.concatenate([np.zeros(0, bool), *self.blocks("near")]))

    def band(self, number: int) -> np.ndarray:
        """Return (n,) uint64: one band of these records, read in blocks so that the other bands use no memory."""
        out = []
        for part in self.parts:
            with (part.folder(self.out) / "bands.bin").open("rb") as stream:
                while len(block := np.fromfile(stream, np.uint64, dedup.BANDS * 65536)):
                    out.append(block.reshape(-1, dedup.BANDS)[:, number].copy())
        return np.concatenate(out) if out else np.zeros(0, np.uint64)

    def place(self, number: int) -> tuple[int, int]:
        """Return (part, row within the part) of a record."""
        part = int(np.searchsorted(self.starts, number, side="right")) - 1
        return part, number - int(self.starts[part])

    def read(self, number: int) -> Record:
        part, row = self.place(number)
        folder = self.parts[part].folder(self.out)
        with (folder / "index.bin").open("rb") as index, (folder / "records.jsonl").open("rb") as records:
            index.seek(row * INDEX.itemsize)
            records.seek(int(np.fromfile(index, INDEX, 1)["begin"][0]))
            return from_line(records.readline())


def compare(parts: Sequence[InputPart], section: Prepare, seed: int, out: Path) -> None:
    """Decide about every record of the training parts.

    Writes verdict.npy (int8) and repeats.npy (pairs of a lost record, numbered within its part, and the record that it
    repeats, numbered within its kind) into each part's folder, and examination.npz, the index of held-out and evaluation
    texts, next to the folders.
    """
    if (out / "parts" / "compare.json").is_file():
        return
    forbidden: list[Record] = []
    for kind in KINDS:
        chosen = [part for part in parts if part.kind == kind and part.role == "train"]
        if not chosen:
            continue
        record_index = RecordIndex(chosen, out)
        verdict = np.zeros(len(record_index), np.int8)
        pairs = [np.zeros((0, 2), np.int64)]  # (lost record, record that it repeats)
        if getattr(section.dedup, kind) != "off":
            same, first = dedup.find_exact(partial(record_index.blocks, "digest"), len(record_index))
            verdict[same] = SAME
            pairs.append(np.stack([same, first], axis=1))
        if getattr(section.dedup, kind) == "near":
            numbers = record_index.near()

            @lru_cache(maxsize=4096)
            def folded(index: int, numbers: np.ndarray = numbers, record_index: RecordIndex = record_index) -> str:
                return dedup.fold(dedup.text_of(record_index.read(int(numbers[index]))))

            found = dedup.find_near(record_index.band, verdict[numbers] != KEPT, folded, section.dedup.threshold)
            near = numbers[np.array(sorted(found.items()), np.int64).reshape(-1, 2)]
            verdict[near[:, 0]] = NEAR
            pairs.append(near)
        if not isinstance(section.held_out, str):
            free = verdict == KEPT
            verdict[choose_held_out(free, section.held_out, seed, section.held_out_at_most)] = HELD_OUT
        forbidden += [record_index.read(int(number)) for number in np.flatnonzero(verdict == HELD_OUT)]
        repeats = np.concatenate(pairs)
        for place, part in enumerate(chosen):
            begin, end = record_index.starts[place : place + 2]
            mine = repeats[(repeats[:, 0] >= begin) & (repeats[:, 0] < end)]
            np.save(part.folder(out) / "verdict.npy", verdict[begin:end])
            np.save(part.folder(out) / "repeats.npy", mine - np.array([begin, 0]))
    for part in parts:
        if part.role != "train":
            forbidden += load_records(part.folder(out) / "records.jsonl")
    dedup.ContaminationIndex.from_records(forbidden).save(out / "parts" / "examination.npz")
    artifact.write_json(out / "parts" / "compare.json", {})


# -- one file again ------------------------------------------------------------------------------------------------

REASONS = {SAME: "duplicate", NEAR: "near_duplicate"}


def settle(part: InputPart, parts: Sequence[InputPart], section: Prepare, out: Path) -> None:
    """Write the kept (kept.jsonl), held-out (held_out.jsonl) and lost records with reasons (lost.jsonl) of one file, and
    complete its ledger."""
    folder = part.folder(out)
    if (folder / "settled.json").is_file():
        return
    scanned = json.loads((folder / "scan.json").read_text(encoding="utf-8"))["ledger"]
    ledger = Ledger.from_dict(scanned)
    if part.role == "train":
        examination = dedup.ContaminationIndex.load(out / "parts" / "examination.npz")
        record_index = RecordIndex([one for one in parts if one.kind == part.kind and one.role == "train"], out)
        verdict = np.load(folder / "verdict.npy")
        repeats = dict(np.load(folder / "repeats.npy").tolist())
    index = (entry for block in iter_index(folder) for entry in block)
    counts: Counter[str] = Counter()
    with (
        (folder / "records.jsonl").open("rb") as records,
        (folder / "kept.jsonl").open("wb") as kept,
        (folder / "held_out.jsonl").open("wb") as held_out,
        (folder / "lost.jsonl").open("wb") as lost,
    ):
        for row, (line, entry) in enumerate(zip(records, index, strict=True)):
            if part.role == "held_out" or (part.role == "train" and verdict[row] == HELD_OUT):
                held_out.write(line)
                counts["held_out"] += 1
                continue
            if part.role == "evaluation":
                continue
            record = from_line(line)
            reason, rule = "", ""
            if verdict[row] in REASONS:
                reason = REASONS[verdict[row]]
                other = record_index.read(repeats[row]).origin
                rule = _("repeats {other}").format(other=other)
            elif match := examination.match(record, entry["digest"].tobytes()):
                reason = "contaminated"
                rule = (
                    _("appears in held-out or evaluation data")
                    if match == "same"
                    else _("contains a text from held-out or evaluation data")
                )
            if reason:
                ledger.move(reason, int(entry["size"]))
                value = {key: text for key, text in record.to_dict().items() if key != "origin"}
                lost.write(RejectedRow(record.origin, reason, rule, value).to_line())
                counts[reason] += 1
            else:
                kept.write(line)
                counts["kept"] += 1
    artifact.sync_tree(folder)
    artifact.write_json(folder / "settled.json", {"ledger": ledger.to_dict(), "counts": counts})


def join(parts: Sequence[InputPart], section: Prepare, out: Path) -> dict[str, Any]:
    """Concatenate all files in order and delete the parts. Returns the ledger of each kind, by reason and by file.

    Raises DataError when training rows are contaminated and the recipe refuses that."""
    tables: dict[str, Any] = {}
    unread = {part.index: scan.get("unread") for part, scan in zip(parts, read_scans(parts, out), strict=True)}
    settled = {
        part.index: json.loads((part.folder(out) / "settled.json").read_text(encoding="utf-8")) for part in parts
    }
    with (out / "rejected.jsonl").open("wb") as rejected:
        for kind in KINDS:
            chosen = [part for part in parts if part.kind == kind]
            if not any(part.role == "train" for part in chosen):
                continue
            _check_contamination(
                [part for part in chosen if settled[part.index]["counts"].get("contaminated")], section, out
            )
            ledger, files, held = Ledger("rows", "bytes"), {}, 0
            with (out / f"{kind}.jsonl").open("wb") as kept, (out / f"{kind}.held_out.jsonl").open("wb") as held_out:
                for part in chosen:
                    folder = part.folder(out)
                    held += settled[part.index]["counts"].get("held_out", 0)
                    for name, stream in (
                        ("kept", kept),
                        ("held_out", held_out),
                        ("rejected", rejected),
                        ("lost", rejected),
                    ):
                        with (folder / f"{name}.jsonl").open("rb") as source:
                            shutil.copyfileobj(source, stream, 1 << 20)
                    if part.role == "train":
                        mine = Ledger.from_dict(settled[part.index]["ledger"])
                        ledger.add(mine)
                        files[part.name] = {**mine.to_dict(), "source": part.number}
                        if unread[part.index]:
                            files[part.name]["unread"] = unread[part.index]
            if not held:
                (out / f"{kind}.held_out.jsonl").unlink()
            from_training = not isinstance(section.held_out, str)
            tables[kind] = {
                **ledger.to_dict(),
                "train": ledger.kept - (held if from_training else 0),
                "held_out": held,
                "from_training": from_training,
                "files": files,
            }
            _check_left(tables[kind], kind)
    shutil.rmtree(out / "parts")
    return tables


def _check_left(table: dict[str, Any], kind: str) -> None:
    if table["train"] < 1:
        lost = ", ".join(f"{reason} {count['rows']}" for reason, count in table["lost"].items())
        raise DataError(_("no row is left to train on: {lost}").format(lost=lost), place=f"prepare.{kind}")


def _check_contamination(parts: Sequence[InputPart], section: Prepare, out: Path) -> None:
    if section.contaminated != "refuse" or not parts:
        return
    rows = [json.loads(line) for line in (parts[0].folder(out) / "lost.jsonl").read_bytes().splitlines()]
    first = next(row for row in rows if row["reason"] == "contaminated")
    raise DataError(
        _("training rows appear in held-out or evaluation data, the first: row {row}").format(row=first["row"]),
        place=f"{first['file']}:{first['row']}",
        remedy="prepare: {contaminated: remove}",
    )
