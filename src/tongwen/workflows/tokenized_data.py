"""What a recipe teaches, as tokens: for the stage that trains on it, and for those that only look.

The training stage reads what `prepare` kept, and keeps the tokens beside it, under a key of everything that decides
them; whoever looks reads the sources themselves and writes nothing.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from tongwen import __version__
from tongwen.core import artifact, console, distributed
from tongwen.core.chat_template import Template
from tongwen.core.errors import DataError, ModelError, RowRefused
from tongwen.core.i18n import _
from tongwen.core.records import Dialogue, Document, Span
from tongwen.data import token_store
from tongwen.data.clean import han_share
from tongwen.data.encode import Encoder, check_round_trip, check_store, describe, encode_dialogues, encode_documents
from tongwen.data.input_parts import list_parts
from tongwen.data.ledger import Ledger, Rejected, table_rows
from tongwen.data.legacy_encoder import LegacyEncoder
from tongwen.data.prepare_steps import iter_records, load_records
from tongwen.data.sampling import choose_held_out, draw, passes_of
from tongwen.data.token_store import Batch, TokenStore
from tongwen.hub.download import local_copy
from tongwen.model.loading import chat_setup, load
from tongwen.model.loading.fingerprint import fingerprint_text, fingerprint_tokenizer
from tongwen.recipe.schema import Recipe
from tongwen.recipe.training import Pretrain, Sft, Training
from tongwen.workflows.prepared_data import find_prepared
from tongwen.workflows.stage_inputs import inputs

ROUND_TRIP = "round_trip.json"  # beside the tokens that it is about
NEW_ROWS = "new_rows.json"  # beside a model whose vocabulary was extended
MISSED = 0.1  # of its part of the tokens that a source may miss in silence
MOSTLY_HAN = 0.3  # share of the letters from which a text counts as Chinese


@dataclass(frozen=True)
class RecordEncoder(ABC):
    """What turns records of one kind into tokens."""

    tokenizer: Any
    encoder: Encoder
    kind: ClassVar[str]

    @property
    @abstractmethod
    def decides(self) -> dict[str, Any]:
        """What decides the tokens, besides content and tokenizer."""

    @abstractmethod
    def batches(self, records: Iterator[Any], ledger: Ledger, reject: Callable[[Rejected], None]) -> Iterator[Batch]:
        """The samples to train on."""

    @abstractmethod
    def held_out(self, records: list[Any], ledger: Ledger, reject: Callable[[Rejected], None]) -> Iterator[Batch]:
        """The samples to be scored."""

    @abstractmethod
    def check(self, store: TokenStore, rejected: list[dict[str, Any]]) -> dict[str, Any]:
        """The mask's statistics. Raises DataError when there is nothing to learn."""

    @abstractmethod
    def round_trip(self, records: Iterator[Any], count: int) -> dict[str, int]:
        """How many records do not decode to their own text."""


@dataclass(frozen=True)
class DialogueEncoder(RecordEncoder):
    """Dialogues, rendered by a template."""

    template: Template
    section: Sft
    kind: ClassVar[str] = "dialogues"

    @property
    def decides(self) -> dict[str, Any]:
        return {
            "template": fingerprint_text(self.template.source),
            "settings": self.section.model_dump(
                mode="json", include={"learn", "thinking", "max_length", "too_long", "legacy"}
            ),
        }

    def batches(self, records: Iterator[Any], ledger: Ledger, reject: Callable[[Rejected], None]) -> Iterator[Batch]:
        return encode_dialogues(records, self.template, self.encoder, self.section, ledger, reject)

    def held_out(self, records: list[Any], ledger: Ledger, reject: Callable[[Rejected], None]) -> Iterator[Batch]:
        return self.batches(iter(records), ledger, reject)

    def check(self, store: TokenStore, rejected: list[dict[str, Any]]) -> dict[str, Any]:
        return check_store(store, self.section, rejected)

    def round_trip(self, records: Iterator[Any], count: int) -> dict[str, int]:
        def render(dialogue: Dialogue) -> list[tuple[Span, ...]]:
            try:
                samples = self.template.samples(dialogue, self.section.learn, self.section.thinking)
            except RowRefused:
                return []
            return [sample.spans for sample in samples]

        return check_round_trip(records, count, render, self.encoder)


@dataclass(frozen=True)
class DocumentEncoder(RecordEncoder):
    """Plain text. end: the id that ends a document."""

    end: int
    section: Pretrain
    kind: ClassVar[str] = "documents"

    @property
    def decides(self) -> dict[str, Any]:
        words = self.section.model_dump(mode="json", include={"max_length", "documents"})
        return {"end": self.end, "settings": words}

    def batches(self, records: Iterator[Any], ledger: Ledger, reject: Callable[[Rejected], None]) -> Iterator[Batch]:
        words = self.section
        return encode_documents(records, self.encoder, self.end, words.max_length, ledger, arrangement=words.documents)

    def held_out(self, records: list[Any], ledger: Ledger, reject: Callable[[Rejected], None]) -> Iterator[Batch]:
        """Apart, however they are trained: so that scores of different arrangements can be compared."""
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
    """The encoded data: what is learned, and what was held out, by language where that is known ("" where not)."""

    store: TokenStore
    mask: dict[str, Any]
    ledger: Ledger
    rejected: list[dict[str, Any]]
    draw: Callable[[int], list[int]]
    held_out: list[Any]
    held_out_stores: dict[str, TokenStore]
    notices: list[str] = field(default_factory=list)


def say_mask(mask: dict[str, Any]) -> str:
    """What is learned, in a line."""
    return _(
        "{learned_share:.0%} of {tokens:,} tokens count toward the loss; {stop_learned_share:.0%} of {samples:,} samples learn to stop"
    ).format(
        learned_share=mask["learned_share"],
        tokens=mask["tokens"],
        stop_learned_share=mask["stop_learned_share"],
        samples=mask["samples"],
    )


def say_ledger(lesson: TokenizedData) -> None:
    """Where the rows went, and what of them is learned."""
    rows = table_rows(lesson.ledger.to_dict(), _("encode"), _("trained"))
    console.table((_("ledger"), _("rows"), "token"), rows)
    mask, rejected = lesson.mask, lesson.rejected
    console.tell(say_mask(mask))
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


def read_dialogues(base: str, section: Sft) -> DialogueEncoder:
    tokenizer = _tokenizer_for(base, section)
    legacy = section.legacy
    encoder = LegacyEncoder(tokenizer, section.template, section.max_length) if legacy else Encoder(tokenizer)
    return DialogueEncoder(
        tokenizer, encoder, chat_setup.bind_template(section.template, tokenizer, encoder.prefix), section
    )


def read_documents(base: str, section: Pretrain) -> DocumentEncoder:
    tokenizer = _tokenizer_for(base, section)
    return DocumentEncoder(tokenizer, Encoder(tokenizer), chat_setup.end_of_text(tokenizer), section)


def _tokenizer_for(base: str, section: Training) -> Any:
    """The base's; an adapter that is trained further goes on with its own."""
    further = section.adapter.continue_from
    place = load.locate(base)
    return load.load_tokenizer(load.tokenizer_ref(replace(place, adapters=(further,))) if further else place)


def are_rows_untrained(base: str) -> bool:
    """Whether a base comes straight from the vocabulary stage."""
    made = artifact.find(Path(base))
    return made is not None and made.kind == "vocab"


def new_rows_of(base: str) -> list[int]:
    """The ids that the vocabulary stage added to this base. Raises ModelError when it says none."""
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


def look_ahead(recipe: Recipe, reader: RecordEncoder) -> TokenizedData:
    """The recipe's records of the reader's kind, encoded in memory: what `prepare` has kept of them, or else read and cleaned
    here. What is held out is left out, as far as it is known before the rows are compared."""
    ledger, rejected = Ledger("rows", "tokens"), list[Rejected]()
    if made := find_prepared(recipe):
        rows = load_records(made.path / f"{reader.kind}.jsonl")
        sources, files = _sources_of(made, reader.kind)
    else:
        rows, sources, files = _read_here(recipe, reader.kind)
    store = token_store.in_memory(reader.batches(rows, ledger, rejected.append))
    lost = [json.loads(bad.to_line()) for bad in rejected]
    mask = reader.check(store, lost)
    drawn, missed = _drawn(store, sources, files, recipe.seed)
    return TokenizedData(store, mask, ledger, lost, drawn, [], {}, missed)


def _read_here(recipe: Recipe, kind: str) -> tuple[Iterator[Any], list[dict[str, Any]], dict[str, int]]:
    """(records, sources, number of the source by file)."""
    prepare = inputs(recipe)
    console.notice(
        _(
            "prepare has not run on these data: the row counts still include duplicates and rows that repeat held-out data"
        )
    )
    parts = list_parts(prepare, local_copy, console.notice)
    rows = list(iter_records(parts, prepare, kind, console.notice))
    if not isinstance(prepare.held_out, str):
        stays = np.ones(len(rows), bool)
        stays[choose_held_out(stays, prepare.held_out, recipe.seed, prepare.held_out_at_most)] = False
        rows = [rows[index] for index in np.flatnonzero(stays)]
    sources = [source.model_dump() for source in getattr(prepare, kind)]
    return iter(rows), sources, {part.name: part.number for part in parts if (part.kind, part.role) == (kind, "train")}


def _sources_of(prepared: artifact.Artifact, kind: str) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """(sources, number of the source by file)."""
    files = prepared.manifest["ledger"][kind]["files"]
    return prepared.manifest["sources"][kind], {file: found["source"] for file, found in files.items()}


def encode_prepared(prepared: artifact.Artifact, reader: RecordEncoder, seed: int, folder: Path) -> TokenizedData:
    """Training and held-out rows as tokens, every one of them in the ledger. Encoded once: the first process writes, an
    interrupted one goes on, the others wait and map the same files."""
    place = folder / key_of(prepared, reader)
    with console.waiting(_("finding the tokens")):
        found = token_store.open_store(place)
    if found:
        console.good(_("tokens: already encoded"))
    elif distributed.is_first():
        _encode(prepared.path / f"{reader.kind}.jsonl", reader, place)
    while (found := found or token_store.open_store(place)) is None:
        time.sleep(0.2)
    store, ledger = found
    rejected = list(token_store.read_rejected(place))
    mask = reader.check(store, rejected)
    mask["round_trip"] = json.loads((place / ROUND_TRIP).read_text(encoding="utf-8"))
    sources, files = _sources_of(prepared, reader.kind)
    languages = {file: sources[number].get("language") for file, number in files.items()}
    held_out, held_out_stores = _encode_held_out(prepared, reader, ledger, languages)
    drawn, missed = _drawn(store, sources, files, seed)
    return TokenizedData(store, mask, ledger, rejected, drawn, held_out, held_out_stores, missed)


def key_of(prepared: artifact.Artifact, reader: RecordEncoder) -> str:
    """Everything that decides the tokens: content, tokenizer, template, settings, code."""
    facts = {
        "content": prepared.fingerprint,
        "tokenizer": fingerprint_tokenizer(reader.tokenizer),
        **reader.decides,
        "code": [__version__, token_store.FORMAT],
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def _encode(file: Path, reader: RecordEncoder, place: Path) -> None:
    """Into the store, from where an interrupted run left it; the tokens of earlier settings go."""
    for other in place.parent.glob("*") if place.parent.is_dir() else ():
        if other not in (place, artifact.partial_of(place)):
            shutil.rmtree(other)
    if place.exists():
        console.notice(_("{place} has changed since it was written: encoding it again").format(place=place))
        shutil.rmtree(place)
    writer = token_store.Writer(place, len(reader.tokenizer))
    ledger, rejected = writer.ledger, list[Rejected]()
    total = sum(1 for _ in file.open("rb"))
    if writer.rows:
        console.notice(_("encoding continues at row {rows:,}").format(rows=writer.rows))
    rows = islice(load_records(file), writer.rows, None)
    with console.progress(total, "encode", writer.rows) as bar:
        for batch in reader.batches(rows, ledger, rejected.append):
            writer.add(batch, ledger, [bad.to_line() for bad in rejected])
            rejected.clear()
            bar.update(writer.rows, f"{console.human_count(writer.tokens)} token")
    artifact.write_json(writer.working / ROUND_TRIP, reader.round_trip(load_records(file), total))
    writer.close()


def _encode_held_out(
    prepared: artifact.Artifact, reader: RecordEncoder, ledger: Ledger, languages: dict[str, str | None]
) -> tuple[list[Any], dict[str, TokenStore]]:
    """What was held out, encoded in the same way, documents by their language; in the ledger it is a loss of its own name."""
    file = prepared.path / f"{reader.kind}.held_out.jsonl"
    if not file.is_file():
        return [], {}
    records, bad, aside = list(load_records(file)), list[Rejected](), Ledger("rows", "tokens")
    groups: dict[str, list[Any]] = {}
    for record in records:
        groups.setdefault(_language_of(record, languages), []).append(record)
    found = {name: token_store.in_memory(reader.held_out(groups[name], aside, bad.append)) for name in sorted(groups)}
    if prepared.manifest["ledger"][reader.kind]["from_training"]:
        ledger.enter(aside.size_in, things=len(records))
        ledger.lose("held_out", aside.size_in, things=len(records))
    if bad:
        console.notice(
            _("{count} held-out samples are not scored, the first: {rule}").format(count=len(bad), rule=bad[0].rule)
        )
    return records, {name: store for name, store in found.items() if len(store)}


def _language_of(record: Document | Dialogue, languages: dict[str, str | None]) -> str:
    """What the source says, else zh or other by the share of Chinese characters."""
    if isinstance(record, Dialogue):
        return ""
    return languages.get(record.origin.file) or ("zh" if han_share(record.text) >= MOSTLY_HAN else "other")


def _drawn(
    store: TokenStore, sources: list[dict[str, Any]], source_of: dict[str, int], seed: int
) -> tuple[Callable[[int], list[int]], list[str]]:
    """(epoch -> its samples in their order, with the weights and shares of the sources; what to say of those that the first
    epoch misses, as few long samples do)."""
    by_file = np.array([source_of.get(file, 0) for file in store.files], np.int64)
    owners = by_file[store.samples["file"]] if len(by_file) else np.zeros(0, np.int64)
    tokens = np.bincount(owners, weights=store.lengths, minlength=len(sources)).astype(int).tolist()
    passes = passes_of(tokens, [one["weight"] for one in sources], [one["share"] for one in sources])
    for one, times in zip(sources, passes, strict=True):
        if times != 1:
            console.tell(_("{path}: {times:.3g} passes per epoch").format(path=one["path"], times=times))
    missed = list[str]()
    if any(times != 1 for times in passes):
        first, asked = draw(owners, passes, seed, 0), np.multiply(tokens, passes)
        drawn = np.bincount(owners[first], weights=store.lengths[first], minlength=len(sources))
        for one, times, asks, got in zip(sources, passes, asked / asked.sum(), drawn / drawn.sum(), strict=True):
            wanted = one["share"] or asks
            if times != 1 and abs(got - wanted) > MISSED * wanted:
                missed.append(
                    _(
                        "{path}: the recipe asks for {wanted:.3g} of the tokens, but the first epoch has {got:.3g}: its samples are too few or too long"
                    ).format(path=one["path"], wanted=wanted, got=got)
                )
    for text in missed:
        console.notice(text)
    return lambda epoch: draw(owners, passes, seed, epoch), missed
