"""A recipe's training data as tokens: stored for the stage that trains on it, in memory for `look` and `plan`.

The training stage encodes the output of `prepare` and stores the tokens beside it, in a folder named by a hash of
everything that decides them. `look` and `plan` may also read the sources themselves, and write nothing.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from tongwen import __version__
from tongwen.core import artifact, console, distributed
from tongwen.core.i18n import _
from tongwen.core.records import Document, Record
from tongwen.data import token_store
from tongwen.data.clean import han_share
from tongwen.data.input_parts import list_parts
from tongwen.data.ledger import Ledger, RejectedRow, table_rows
from tongwen.data.preference_store import PreferenceStore, Samples
from tongwen.data.prepare_steps import ScanCounts, describe_unread, iter_records, load_records
from tongwen.data.sampling import choose_held_out, draw, passes_of
from tongwen.data.token_store import TokenStore
from tongwen.hub.download import local_copy
from tongwen.model.loading.fingerprint import fingerprint_tokenizer
from tongwen.recipe.schema import Recipe
from tongwen.workflows.prepared_data import find_prepared
from tongwen.workflows.record_encoders import RecordEncoder
from tongwen.workflows.stage_inputs import inputs

ROUND_TRIP = "round_trip.json"  # in the folder of the tokens
STORE = re.compile(r"[0-9a-f]{16}(\.partial)?")  # a folder of tokens, by its key
TOLERANCE = 0.1  # share of its tokens by which a source may fall short without a notice
MOSTLY_HAN = 0.3  # share of the letters from which a text counts as Chinese


@dataclass(frozen=True)
class TokenizedData:
    """The encoded data: what training draws, and held-out samples by language ("" if unknown)."""

    store: Samples
    mask: dict[str, Any]
    ledger: Ledger
    rejected: list[dict[str, Any]]
    draw: Callable[[int], list[int]]
    held_out: list[Any]
    held_out_stores: dict[str, Any]
    notices: list[str] = field(default_factory=list)

    @property
    def samples(self) -> TokenStore:
        """The training samples; of a pair, both."""
        return self.store.store if isinstance(self.store, PreferenceStore) else self.store


def describe_mask(mask: dict[str, Any]) -> str:
    """Return a line about the share of learned tokens."""
    return _(
        "{learned_share:.0%} of {tokens:,} tokens count toward the loss; {stop_learned_share:.0%} of {samples:,} samples learn to stop"
    ).format(
        learned_share=mask["learned_share"],
        tokens=mask["tokens"],
        stop_learned_share=mask["stop_learned_share"],
        samples=mask["samples"],
    )


def report_ledger(data: TokenizedData) -> None:
    """Print the ledger, the share of learned tokens, and notices about samples that are not used."""
    rows = table_rows(data.ledger.to_dict(), _("encode"), _("trained"))
    console.table((_("ledger"), _("rows"), "token"), rows)
    mask, rejected = data.mask, data.rejected
    console.info(describe_mask(mask))
    if mask["round_trip"]["differ"]:
        console.notice(
            _(
                "{differ} of {checked} samples do not decode to their own text: the tokenizer lacks or changes characters"
            ).format(**mask["round_trip"])
        )
    if rejected:
        first = rejected[0]
        console.notice(
            _("{count} samples are not used in training, the first: {file}:{row}: {rule}").format(
                count=len(rejected), file=first["file"], row=first["row"], rule=first["rule"]
            )
        )


def encode_in_memory(recipe: Recipe, record_encoder: RecordEncoder) -> TokenizedData:
    """Encode the recipe's training records of the encoder's kind in memory.

    The records come from `prepare` if its output is up to date. Otherwise the sources are read and cleaned, and
    held-out rows are left out as far as they are known without the search for duplicates.
    """
    ledger, rejected = Ledger("rows", "tokens"), list[RejectedRow]()
    if made := find_prepared(recipe):
        rows = load_records(made.path / f"{record_encoder.kind}.jsonl")
        sources, files = _sources_of(made, record_encoder.kind)
    else:
        rows, sources, files = _read_sources(recipe, record_encoder.kind)
    records = list(rows) if record_encoder.kind == "preferences" else rows  # their labels are read after the rows
    samples = token_store.in_memory(record_encoder.batches(iter(records), ledger, rejected.append))
    lost = [json.loads(bad.to_line()) for bad in rejected]
    mask = record_encoder.check(samples, lost)
    store = record_encoder.arrange(samples, records)
    sampler, missed = _make_sampler(store, sources, files, recipe.seed)
    return TokenizedData(store, mask, ledger, lost, sampler, [], {}, missed)


def _read_sources(recipe: Recipe, kind: str) -> tuple[Iterator[Any], list[dict[str, Any]], dict[str, int]]:
    """Return (records, sources, number of the source by file)."""
    prepare = inputs(recipe)
    console.notice(
        _(
            "prepare has not run on these data: the row counts still include duplicates and rows that repeat held-out data"
        )
    )
    parts = list_parts(prepare, local_copy, console.notice)
    counts = ScanCounts()
    rows = list(iter_records(parts, prepare, kind, console.notice, counts))
    _report_rows(counts)
    if not isinstance(prepare.held_out, str):
        keep = np.ones(len(rows), bool)
        keep[choose_held_out(keep, prepare.held_out, recipe.seed, prepare.held_out_at_most)] = False
        rows = [rows[index] for index in np.flatnonzero(keep)]
    sources = [source.model_dump() for source in getattr(prepare, kind)]
    return iter(rows), sources, {part.name: part.number for part in parts if (part.kind, part.role) == (kind, "train")}


def _report_rows(counts: ScanCounts) -> None:
    """Print which rows cannot be read, and which fields of the others nothing reads."""
    if counts.bad:
        place, rule = counts.first_bad[0]
        console.notice(
            _("{refused:,} rows cannot be read, the first: {first}").format(
                refused=counts.bad, first=f"{place}: {rule}"
            )
        )
    if notice := describe_unread(counts.unread):
        console.notice(notice)


def _sources_of(prepared: artifact.Artifact, kind: str) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """Return (sources, number of the source by file)."""
    files = prepared.manifest["ledger"][kind]["files"]
    return prepared.manifest["sources"][kind], {file: found["source"] for file, found in files.items()}


def encode_prepared(
    prepared: artifact.Artifact, record_encoder: RecordEncoder, seed: int, folder: Path
) -> TokenizedData:
    """Return training and held-out rows as tokens, each accounted for in the ledger.

    Rows are encoded once: the first process writes the tokens and continues after an interruption; the other processes
    wait and map the same files.
    """
    store_folder = folder / cache_key(prepared, record_encoder)
    with console.waiting(_("finding the tokens")):
        found = token_store.open_store(store_folder)
    if found:
        console.success(_("tokens: already encoded"))
    elif distributed.is_main_process():
        _encode(prepared.path / f"{record_encoder.kind}.jsonl", record_encoder, store_folder)
    while (found := found or token_store.open_store(store_folder)) is None:
        time.sleep(0.2)
    store, ledger = found
    rejected = list(token_store.read_rejected(store_folder))
    mask = record_encoder.check(store, rejected)
    mask["round_trip"] = artifact.read_json(store_folder / ROUND_TRIP)
    sources, files = _sources_of(prepared, record_encoder.kind)
    languages = {file: sources[number].get("language") for file, number in files.items()}
    store = record_encoder.arrange(store, load_records(prepared.path / f"{record_encoder.kind}.jsonl"))
    held_out, held_out_stores = _encode_held_out(prepared, record_encoder, ledger, languages)
    sampler, missed = _make_sampler(store, sources, files, seed)
    return TokenizedData(store, mask, ledger, rejected, sampler, held_out, held_out_stores, missed)


def cache_key(prepared: artifact.Artifact, record_encoder: RecordEncoder) -> str:
    """Return a hash of everything that decides the tokens: content, tokenizer, template, settings, code."""
    facts = {
        "content": prepared.fingerprint,
        "tokenizer": fingerprint_tokenizer(record_encoder.tokenizer),
        **record_encoder.decides,
        "code": [__version__, token_store.FORMAT],
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def _encode(file: Path, record_encoder: RecordEncoder, store_folder: Path) -> None:
    """Encode a file into the store, continuing an interrupted run; tokens of earlier settings are deleted."""
    for other in store_folder.parent.glob("*") if store_folder.parent.is_dir() else ():
        if STORE.fullmatch(other.name) and other not in (store_folder, artifact.partial_of(store_folder)):
            shutil.rmtree(other)
    if store_folder.exists():
        console.notice(_("{place} has changed since it was written: encoding it again").format(place=store_folder))
        shutil.rmtree(store_folder)
    writer = token_store.Writer(store_folder, len(record_encoder.tokenizer))
    ledger, rejected = writer.ledger, list[RejectedRow]()
    total = sum(1 for _ in file.open("rb"))
    if writer.rows:
        console.notice(_("encoding continues at row {rows:,}").format(rows=writer.rows))
    rows = islice(load_records(file), writer.rows, None)
    with console.progress(total, "encode", writer.rows) as bar:
        for batch in record_encoder.batches(rows, ledger, rejected.append):
            writer.add(batch, ledger, [bad.to_line() for bad in rejected])
            rejected.clear()
            bar.update(writer.rows, f"{console.human_count(writer.tokens)} token")
    artifact.write_json(writer.working / ROUND_TRIP, record_encoder.round_trip(load_records(file), total))
    writer.close()


def _encode_held_out(
    prepared: artifact.Artifact, record_encoder: RecordEncoder, ledger: Ledger, languages: dict[str, str | None]
) -> tuple[list[Any], dict[str, TokenStore]]:
    """Return held-out records and their tokens, documents by language; the ledger lists them as lost to `held_out`."""
    file = prepared.path / f"{record_encoder.kind}.held_out.jsonl"
    if not file.is_file():
        return [], {}
    records, bad, aside = list(load_records(file)), list[RejectedRow](), Ledger("rows", "tokens")
    groups: dict[str, list[Any]] = {}
    for record in records:
        groups.setdefault(_language_of(record, languages), []).append(record)
    found = {
        name: record_encoder.arrange(
            token_store.in_memory(record_encoder.held_out(groups[name], aside, bad.append)), groups[name]
        )
        for name in sorted(groups)
    }
    if prepared.manifest["ledger"][record_encoder.kind]["from_training"]:
        ledger.enter(aside.size_in, items=len(records))
        ledger.lose("held_out", aside.size_in, items=len(records))
    if bad:
        console.notice(
            _("{count} held-out samples are not scored, the first: {rule}").format(count=len(bad), rule=bad[0].rule)
        )
    return records, {name: store for name, store in found.items() if len(store)}


def _language_of(record: Record, languages: dict[str, str | None]) -> str:
    """Return the source's language, else zh or other by the share of Chinese characters."""
    if not isinstance(record, Document):
        return ""
    return languages.get(record.origin.file) or ("zh" if han_share(record.text) >= MOSTLY_HAN else "other")


def _make_sampler(
    store: TokenStore, sources: list[dict[str, Any]], source_of: dict[str, int], seed: int
) -> tuple[Callable[[int], list[int]], list[str]]:
    """Return (function from epoch to its samples in order, by the weights and shares of the sources; notices about
    sources whose share the first epoch misses, because their samples are few and long)."""
    by_file = np.array([source_of.get(file, 0) for file in store.files], np.int64)
    owners = by_file[store.samples["file"]] if len(by_file) else np.zeros(0, np.int64)
    tokens = np.bincount(owners, weights=store.lengths, minlength=len(sources)).astype(int).tolist()
    passes = passes_of(tokens, [one["weight"] for one in sources], [one["share"] for one in sources])
    for one, times in zip(sources, passes, strict=True):
        if times != 1:
            console.info(_("{path}: {times:.3g} passes per epoch").format(path=one["path"], times=times))
    missed = list[str]()
    if any(times != 1 for times in passes):
        first, asked = draw(owners, passes, seed, 0), np.multiply(tokens, passes)
        drawn = np.bincount(owners[first], weights=store.lengths[first], minlength=len(sources))
        for one, times, asks, got in zip(sources, passes, asked / asked.sum(), drawn / drawn.sum(), strict=True):
            wanted = one["share"] or asks
            if times != 1 and abs(got - wanted) > TOLERANCE * wanted:
                missed.append(
                    _(
                        "{path}: the recipe asks for {wanted:.3g} of the tokens, but the first epoch has {got:.3g}: its samples are too few or too long"
                    ).format(path=one["path"], wanted=wanted, got=got)
                )
    for text in missed:
        console.notice(text)
    return lambda epoch: draw(owners, passes, seed, epoch), missed
