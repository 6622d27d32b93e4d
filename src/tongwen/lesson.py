"""What a recipe teaches, as tokens: for the stage that trains on it, and for those that only look.

The training stage reads what `prepare` kept, and keeps the tokens beside it, under a key of everything that decides
them; whoever looks reads the sources themselves and writes nothing.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from tongwen import __version__, artifact, console, launch
from tongwen.data import store as stores
from tongwen.data.encode import Encoder, check_round_trip, check_store, encode_dialogues
from tongwen.data.ledger import Ledger, Rejected
from tongwen.data.mix import choose_held_out, draw, passes_of
from tongwen.data.parts import iter_records, list_parts, load
from tongwen.data.store import TokenStore
from tongwen.hub.fetching import local_copy
from tongwen.language import say
from tongwen.model import dress
from tongwen.model import load as loading
from tongwen.model.fingerprint import fingerprint_text, fingerprint_tokenizer
from tongwen.recipe.schema import Recipe, Sft
from tongwen.record import Dialogue
from tongwen.template import Template

ROUND_TRIP = "round_trip.json"  # beside the tokens that it is about


@dataclass(frozen=True)
class Reader:
    """What turns a dialogue into tokens."""

    tokenizer: Any
    encoder: Encoder
    template: Template


@dataclass(frozen=True)
class Lesson:
    """The encoded data: what is learned, and what was held out."""

    store: TokenStore
    mask: dict[str, Any]
    ledger: Ledger
    rejected: list[dict[str, Any]]
    draw: Callable[[int], list[int]]
    held_out: list[Dialogue]
    held_out_store: TokenStore | None


def open_reader(base: str, section: Sft) -> Reader:
    tokenizer = loading.load_tokenizer(loading.locate(base))
    encoder = Encoder(tokenizer)
    return Reader(tokenizer, encoder, dress.bind_template(section.template, tokenizer, encoder.prefix))


def look_ahead(recipe: Recipe, reader: Reader) -> Lesson:
    """The recipe's dialogues read, cleaned and encoded in memory. What is held out is left out, as far as it is known
    before the rows are compared."""
    section, prepare = recipe.sft, recipe.prepare
    assert section and prepare
    ledger, rejected = Ledger("rows", "tokens"), list[Rejected]()
    parts = list_parts(prepare, local_copy, console.notice)
    rows = list(_dialogues(iter_records(parts, prepare, "dialogues", console.notice)))
    if not isinstance(prepare.held_out, str):
        stays = np.ones(len(rows), bool)
        stays[choose_held_out(stays, prepare.held_out, recipe.seed, prepare.held_out_at_most)] = False
        rows = [rows[index] for index in np.flatnonzero(stays)]
    store = stores.in_memory(encode_dialogues(rows, reader.template, reader.encoder, section, ledger, rejected.append))
    lost = [json.loads(bad.to_line()) for bad in rejected]
    mask = check_store(store, section, lost)
    sources = [source.model_dump() for source in prepare.dialogues]
    files = {part.name: part.number for part in parts if (part.kind, part.role) == ("dialogues", "train")}
    return Lesson(store, mask, ledger, lost, _drawn(store, sources, files, recipe.seed), [], None)


def encode_prepared(prepared: artifact.Artifact, reader: Reader, section: Sft, seed: int, folder: Path) -> Lesson:
    """Training and held-out rows as tokens, every one of them in the ledger. Encoded once: the first process writes, an
    interrupted one goes on, the others wait and map the same files."""
    place = folder / key_of(prepared, reader, section)
    found = stores.open_store(place)
    if found:
        console.good(say("tokens: already encoded", "token：已编码"))
    elif launch.is_first():
        _encode(prepared.path / "dialogues.jsonl", reader, section, place)
    while (found := found or stores.open_store(place)) is None:
        time.sleep(0.2)
    store, ledger = found
    rejected = list(stores.read_rejected(place))
    mask = check_store(store, section, rejected)
    mask["round_trip"] = json.loads((place / ROUND_TRIP).read_text(encoding="utf-8"))
    held_out, held_out_store = _encode_held_out(prepared, reader, section, ledger)
    sources = prepared.manifest["sources"]["dialogues"]
    files = {file: table["source"] for file, table in prepared.manifest["ledger"]["dialogues"]["files"].items()}
    return Lesson(store, mask, ledger, rejected, _drawn(store, sources, files, seed), held_out, held_out_store)


def key_of(prepared: artifact.Artifact, reader: Reader, section: Sft) -> str:
    """Everything that decides the tokens: content, tokenizer, template, settings, code."""
    facts = {
        "content": prepared.fingerprint,
        "tokenizer": fingerprint_tokenizer(reader.tokenizer),
        "template": fingerprint_text(reader.template.source),
        "settings": section.model_dump(mode="json", include={"learn", "thinking", "max_length", "too_long"}),
        "code": [__version__, stores.FORMAT],
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def _encode(file: Path, reader: Reader, section: Sft, place: Path) -> None:
    """Into the store, from where an interrupted run left it; the tokens of earlier settings go."""
    for other in place.parent.glob("*") if place.parent.is_dir() else ():
        if other not in (place, artifact.partial_of(place)):
            shutil.rmtree(other)
    if place.exists():  # not what its own record says
        shutil.rmtree(place)
    writer = stores.Writer(place, len(reader.tokenizer))
    ledger, rejected = writer.ledger, list[Rejected]()
    total = sum(1 for _ in file.open("rb"))
    if writer.rows:
        console.notice(say(f"encoding goes on at row {writer.rows:,}", f"从第 {writer.rows:,} 行继续编码"))
    rows = islice(_dialogues(load(file)), writer.rows, None)
    with console.progress(total, "encode", writer.rows) as bar:
        for batch in encode_dialogues(rows, reader.template, reader.encoder, section, ledger, rejected.append):
            writer.add(batch, ledger, [bad.to_line() for bad in rejected])
            rejected.clear()
            bar.update(writer.rows, f"{console.human_count(writer.tokens)} token")
    found = check_round_trip(_dialogues(load(file)), total, reader.template, reader.encoder, section)
    artifact.write_json(writer.working / ROUND_TRIP, found)
    writer.close()


def _encode_held_out(
    prepared: artifact.Artifact, reader: Reader, section: Sft, ledger: Ledger
) -> tuple[list[Dialogue], TokenStore | None]:
    """What was held out, encoded in the same way; in the ledger it is a loss of its own name."""
    file = prepared.path / "dialogues.held_out.jsonl"
    if not file.is_file():
        return [], None
    dialogues, bad, aside = list(_dialogues(load(file))), list[Rejected](), Ledger("rows", "tokens")
    store = stores.in_memory(encode_dialogues(dialogues, reader.template, reader.encoder, section, aside, bad.append))
    if prepared.manifest["ledger"]["dialogues"]["from_training"]:
        ledger.enter(aside.size_in, things=len(dialogues))
        ledger.lose("held_out", aside.size_in, things=len(dialogues))
    if bad:
        console.notice(
            say(
                f"{len(bad)} held-out samples are not scored, the first: {bad[0].rule}",
                f"{len(bad)} 个留出样本不参与评分，第一个：{bad[0].rule}",
            )
        )
    return dialogues, store if len(store) else None


def _drawn(
    store: TokenStore, sources: list[dict[str, Any]], source_of: dict[str, int], seed: int
) -> Callable[[int], list[int]]:
    """epoch -> its samples in their order, with the weights and shares of the sources."""
    by_file = np.array([source_of.get(file, 0) for file in store.files], np.int64)
    owners = by_file[store.samples["file"]] if len(by_file) else np.zeros(0, np.int64)
    tokens = np.bincount(owners, weights=store.lengths, minlength=len(sources)).astype(int).tolist()
    passes = passes_of(tokens, [one["weight"] for one in sources], [one["share"] for one in sources])
    for one, times in zip(sources, passes, strict=True):
        if times != 1:
            console.tell(say(f"{one['path']}: {times:.3g} passes per epoch", f"{one['path']}：每轮遍历 {times:.3g} 次"))
    return lambda epoch: draw(owners, passes, seed, epoch)


def _dialogues(records: Iterator[Any]) -> Iterator[Dialogue]:
    return (record for record in records if isinstance(record, Dialogue))
