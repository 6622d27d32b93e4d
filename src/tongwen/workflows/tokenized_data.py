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
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from tongwen import __version__
from tongwen.core import artifact, console, distributed
from tongwen.core.chat_template import Template
from tongwen.core.errors import DataError, ModelError, RowRejected
from tongwen.core.i18n import _
from tongwen.core.records import Document, Preference, Record, Span
from tongwen.data import token_store
from tongwen.data.clean import han_share
from tongwen.data.encode import (
    Encoder,
    check_round_trip,
    check_store,
    describe,
    encode_dialogues,
    encode_documents,
    encode_preferences,
)
from tongwen.data.input_parts import list_parts
from tongwen.data.ledger import Ledger, RejectedRow, table_rows
from tongwen.data.legacy_encoder import LegacyEncoder
from tongwen.data.preference_store import PreferenceStore, Samples, arrange
from tongwen.data.prepare_steps import ScanCounts, describe_unread, iter_records, load_records
from tongwen.data.sampling import choose_held_out, draw, passes_of
from tongwen.data.token_store import Batch, TokenStore
from tongwen.hub.download import local_copy
from tongwen.model.loading import chat_setup, load
from tongwen.model.loading.fingerprint import fingerprint_text, fingerprint_tokenizer
from tongwen.recipe.schema import Recipe
from tongwen.recipe.training import Prefer, Pretrain, Sft, Training
from tongwen.workflows.prepared_data import find_prepared
from tongwen.workflows.stage_inputs import inputs

ROUND_TRIP = "round_trip.json"  # in the folder of the tokens
STORE = re.compile(r"[0-9a-f]{16}(\.partial)?")  # a folder of tokens, by its key
NEW_ROWS = "new_rows.json"  # beside a model whose vocabulary was extended
TOLERANCE = 0.1  # share of its tokens by which a source may fall short without a notice
MOSTLY_HAN = 0.3  # share of the letters from which a text counts as Chinese


@dataclass(frozen=True)
class RecordEncoder(ABC):
    """Encodes records of one kind as tokens."""

    tokenizer: Any
    encoder: Encoder
    kind: ClassVar[str]

    @property
    @abstractmethod
    def decides(self) -> dict[str, Any]:
        """The settings that decide the tokens, besides content and tokenizer."""

    @abstractmethod
    def batches(self, records: Iterator[Any], ledger: Ledger, reject: Callable[[RejectedRow], None]) -> Iterator[Batch]:
        """Yield the samples to train on."""

    @abstractmethod
    def held_out(self, records: list[Any], ledger: Ledger, reject: Callable[[RejectedRow], None]) -> Iterator[Batch]:
        """Yield the held-out samples to score."""

    @abstractmethod
    def check(self, store: TokenStore, rejected: list[dict[str, Any]]) -> dict[str, Any]:
        """Return statistics of the loss mask. Raises DataError if there is nothing to learn."""

    def arrange(self, store: TokenStore, records: Iterable[Any]) -> Any:
        """Return the store with the items that training draws. records: those that it was made of."""
        return store

    @abstractmethod
    def round_trip(self, records: Iterator[Any], count: int) -> dict[str, int]:
        """Count the records that do not decode to their own text."""


@dataclass(frozen=True)
class DialogueEncoder(RecordEncoder):
    """Encodes dialogues, rendered by a template."""

    template: Template
    section: Sft
    kind: ClassVar[str] = "dialogues"

    @property
    def decides(self) -> dict[str, Any]:
        return {
            "template": fingerprint_text(self.template.texts),
            "settings": self.section.model_dump(
                mode="json", include={"learn", "thinking", "max_length", "too_long", "legacy"}
            ),
        }

    def batches(self, records: Iterator[Any], ledger: Ledger, reject: Callable[[RejectedRow], None]) -> Iterator[Batch]:
        return encode_dialogues(records, self.template, self.encoder, self.section, ledger, reject)

    def held_out(self, records: list[Any], ledger: Ledger, reject: Callable[[RejectedRow], None]) -> Iterator[Batch]:
        return self.batches(iter(records), ledger, reject)

    def check(self, store: TokenStore, rejected: list[dict[str, Any]]) -> dict[str, Any]:
        return check_store(store, self.section, rejected)

    def round_trip(self, records: Iterator[Any], count: int) -> dict[str, int]:
        def render(record: Any) -> list[tuple[Span, ...]]:
            found: list[tuple[Span, ...]] = []
            for dialogue in record.dialogues if isinstance(record, Preference) else [record]:
                with suppress(RowRejected):
                    samples = self.template.samples(dialogue, self.section.learn, self.section.thinking)
                    found += [sample.spans for sample in samples]
            return found

        return check_round_trip(records, count, render, self.encoder)


@dataclass(frozen=True)
class PreferenceEncoder(DialogueEncoder):
    """Encodes preferences: each answer with its prompt, rendered by a template. paired: only pairs are of use."""

    paired: bool = True
    kind: ClassVar[str] = "preferences"

    @property
    def decides(self) -> dict[str, Any]:
        return {**super().decides, "paired": self.paired}

    def batches(self, records: Iterator[Any], ledger: Ledger, reject: Callable[[RejectedRow], None]) -> Iterator[Batch]:
        return encode_preferences(records, self.template, self.encoder, self.section, self.paired, ledger, reject)

    def check(self, store: TokenStore, rejected: list[dict[str, Any]]) -> dict[str, Any]:
        if not len(store) and rejected and all(bad["reason"] == "unpaired" for bad in rejected):
            raise DataError(
                _("none of the {count} preferences is a pair: they are answers with a label").format(
                    count=len(rejected)
                ),
                place=f"{rejected[0]['file']}:{rejected[0]['row']}",
                remedy="prefer: {method: kto}",
            )
        return check_store(store, self.section, rejected)

    def arrange(self, store: TokenStore, records: Iterable[Any]) -> PreferenceStore:
        if self.paired:
            return arrange(store, None)
        return arrange(store, {record.origin: bool(record.chosen) for record in records if not record.is_pair})


@dataclass(frozen=True)
class DocumentEncoder(RecordEncoder):
    """Encodes plain text. end: the id that ends a document."""

    end: int
    section: Pretrain
    kind: ClassVar[str] = "documents"

    @property
    def decides(self) -> dict[str, Any]:
        settings = self.section.model_dump(mode="json", include={"max_length", "documents"})
        return {"end": self.end, "settings": settings}

    def batches(self, records: Iterator[Any], ledger: Ledger, reject: Callable[[RejectedRow], None]) -> Iterator[Batch]:
        return encode_documents(
            records, self.encoder, self.end, self.section.max_length, ledger, arrangement=self.section.documents
        )

    def held_out(self, records: list[Any], ledger: Ledger, reject: Callable[[RejectedRow], None]) -> Iterator[Batch]:
        """Encode documents apart, even if training concatenates them, so that scores of both can be compared."""
        return encode_documents(records, self.encoder, self.end, self.section.max_length, ledger)

    def check(self, store: TokenStore, rejected: list[dict[str, Any]]) -> dict[str, Any]:
        if not len(store):
            raise DataError(
                _("the text is shorter than one block of {max_length} tokens").format(
                    max_length=self.section.max_length
                ),
                place="pretrain.max_length",
                remedy=_("a smaller max_length, or documents: apart"),
            )
        text = {"tokens": len(store.ids), "learned": store.learned_tokens}
        return {**describe(store), "roles": {"text": text}}

    def round_trip(self, records: Iterator[Any], count: int) -> dict[str, int]:
        return check_round_trip(records, count, lambda document: [[Span(document.text, True)]], self.encoder)


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


def make_dialogue_encoder(base: str, section: Sft) -> DialogueEncoder:
    tokenizer = _tokenizer_for(base, section)
    legacy = section.legacy
    encoder = LegacyEncoder(tokenizer, section.template, section.max_length) if legacy else Encoder(tokenizer)
    return DialogueEncoder(
        tokenizer, encoder, chat_setup.bind_template(section.template, tokenizer, encoder.prefix), section
    )


def make_preference_encoder(base: str, section: Prefer) -> PreferenceEncoder:
    tokenizer = load.load_tokenizer(load.tokenizer_ref(load.locate(base)))  # of the stage before, with its template
    encoder = Encoder(tokenizer)
    rendering = Sft(template=section.template, thinking=section.thinking, max_length=section.max_length)
    template = chat_setup.bind_template(section.template, tokenizer, encoder.prefix)
    return PreferenceEncoder(tokenizer, encoder, template, rendering, section.method != "kto")


def make_document_encoder(base: str, section: Pretrain) -> DocumentEncoder:
    tokenizer = _tokenizer_for(base, section)
    return DocumentEncoder(tokenizer, Encoder(tokenizer), chat_setup.end_of_text(tokenizer), section)


def _tokenizer_for(base: str, section: Training) -> Any:
    """Return the base's tokenizer, or that of the adapter whose training continues."""
    further = section.adapter.continue_from
    place = load.locate(base)
    return load.load_tokenizer(load.tokenizer_ref(replace(place, adapters=(further,))) if further else place)


def are_rows_untrained(base: str) -> bool:
    """Return whether a base is the output of the vocabulary stage, so that its new rows are untrained."""
    made = artifact.find(Path(base))
    return made is not None and made.kind == "vocab"


def new_rows_of(base: str) -> list[int]:
    """Return the ids that the vocabulary stage added to this base. Raises ModelError if new_rows.json lists none."""
    file = Path(base) / NEW_ROWS
    try:
        rows = [int(row) for row in json.loads(file.read_text(encoding="utf-8"))]
    except FileNotFoundError:
        rows = []
    except (OSError, ValueError, TypeError) as error:
        raise ModelError(_("cannot be read: {error}").format(error=error), place=str(file)) from None
    if not rows:
        raise ModelError(
            _("`train: new_rows` needs a base with an extended vocabulary, but new_rows.json lists no new rows"),
            place=str(file),
            remedy=_("add a `vocab` section before it, or train: embeddings"),
        )
    return rows


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
