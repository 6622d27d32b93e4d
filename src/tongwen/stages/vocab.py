"""vocab: prepared text and a base in; the base with a larger vocabulary out, its tokenizer and its rows.

Pieces are learned from what `prepare` kept, and what they bring is measured on what it held out. Before anything is
written, the advice: whether a character becomes so much cheaper that it pays to learn new rows. Then the tokenizer is
written in all its forms and the weights stream through, with the new rows behind the old ones. What comes out is an
ordinary model folder; `new_rows.json` names the rows that have to be trained.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import psutil
import torch

from tongwen import artifact, console, lexicon
from tongwen.data.parts import load as load_records
from tongwen.language import say
from tongwen.lexicon import Extended, Lexicon
from tongwen.model import load, widen
from tongwen.model.fingerprint import combine, model_lines
from tongwen.model.score import bits_per_byte
from tongwen.model.tensors import open_model, read_fp32
from tongwen.recipe.schema import Recipe, Vocab
from tongwen.vocab import grow, measure
from tongwen.vocab.report import as_html
from tongwen.vocab.script import Script
from tongwen.weights import Tensors

NEW_ROWS = "new_rows.json"
SCORED = 8_000  # characters that are scored: half a minute for a small model on a CPU
CHUNK = 400  # characters of a scored text


def settings(recipe: Recipe) -> dict[str, Any]:
    assert recipe.vocab
    return {"vocab": recipe.vocab.model_dump(mode="json"), "seed": recipe.seed, "base": recipe.base}


def run(recipe: Recipe, out: Path) -> artifact.Artifact:
    """Learn, measure, advise, write."""
    section = recipe.vocab
    assert section
    prepared = artifact.open_artifact(out.parent / "prepare", "prepare") if recipe.prepare else None
    place = load.fetched(load.locate(recipe.base))
    console.header("vocab", f"{recipe.base} + {section.pieces:,}")
    old, script = lexicon.open_lexicon(recipe.base), Script(section.script)
    learn_from, rest = _texts(prepared.path if prepared else None)
    learnt = _learn(old, learn_from, script, section)
    made = learnt.extended(section.pieces, section.words, section.special_tokens)

    base, config = open_model(place)
    names = widen.matrices_of(base, place.name)
    ids = range(made.first_new, made.first_new + len(made.parts))
    rows = widen.plan_rows(
        made.first_new, ids, base.facts[names[0]][1][0], section.pad_to_multiple, shrink=section.shrink
    )
    report = measure.survey(old.coder, made.lexicon.coder, {say("held out", "留出文本"): rest}, script)
    report["rows"] = {"filled": rows.filled, "added": rows.added, "padding": rows.padding, "wanted": rows.wanted}
    if section.measure_bits:
        report |= _bits(place, old, made, rows, section, recipe.seed, rest)
    if section.pieces:
        report |= _advise(learnt, rest, recipe.base, section, report.get("bits_per_byte"))
    report["summary"] = f"{recipe.base} · {section.pieces:,} {say('pieces', '个词')} · {section.new_rows}"

    parents: dict[str, Any] = {"base": {"path": recipe.base, "fingerprint": combine(model_lines(place))}}
    if prepared:
        parents["prepare"] = prepared.as_parent()
    with artifact.create(out, "vocab", parents, settings(recipe), swept=True) as draft:
        artifact.check_disk(draft.path, widen.bytes_needed(base, names, rows))
        lexicon.save(made.lexicon, draft.path)
        with console.progress(len(base.facts), "grow") as bar:
            make = _maker(base, made, rows, section, recipe.seed)
            lines = widen.widen(base, names, rows, make, draft.path, bar.update)
        artifact.write_json(draft.path / "config.json", config | {"vocab_size": rows.wanted})
        _carry(place, draft.path)
        artifact.write_json(draft.path / NEW_ROWS, list(ids))
        artifact.write_json(draft.path / "report.json", report)
        title = f"{recipe.name} · vocab"
        (draft.path / "report.html").write_text(as_html(title, report), encoding="utf-8")
        draft.fingerprint = combine(lines)
        draft.facts = {"tokens": report["sizes"], "rows": report["rows"], "tensors": lines}
        draft.record_files(lambda file: file.suffix != ".safetensors")
    _say_rows(rows, out)
    assert draft.artifact
    return draft.artifact


def _texts(prepared: Path | None) -> tuple[Iterable[str], list[str]]:
    """(what is learned from, what is measured on): documents, or dialogues where there are none; what was held out, or
    every tenth text where nothing was."""
    if prepared is None:
        return [], lexicon.shipped_texts()
    kind = "documents" if (prepared / "documents.jsonl").is_file() else "dialogues"
    texts = _read(prepared / f"{kind}.jsonl")
    aside = prepared / f"{kind}.held_out.jsonl"
    if aside.is_file():
        return texts, lexicon.some(_read(aside))
    return lexicon.split(texts)


def _read(file: Path) -> Iterator[str]:
    for record in load_records(file):
        yield from lexicon.texts_of(record)


def _learn(old: Lexicon, texts: Iterable[str], script: Script, section: Vocab) -> lexicon.Learnt:
    """Enough pieces for the recipe and for the curve."""
    if not section.pieces:
        return lexicon.learn(old, (), script, 0)
    most = max(section.pieces, measure.CURVE[-1])
    with console.progress(most, say("learning pieces", "学习新词")) as bar:
        learnt = lexicon.learn(old, texts, script, most, bar.update)
    learnt.say_if_fewer(section.pieces)
    return learnt


def _maker(base: Tensors, made: Extended, rows: widen.Rows, section: Vocab, seed: int) -> widen.MakeRows:
    """The rows of a matrix by its name: those of the new tokens, then the padding."""
    return lambda name: _rows(made, rows, section, seed, lambda begin, end: read_fp32(base, name, begin, end))


def _rows(made: Extended, rows: widen.Rows, section: Vocab, seed: int, read: grow.ReadRows) -> Iterator[grow.Rows]:
    return grow.iter_rows(section.new_rows, made.parts, rows.old, read, padding=rows.padding, seed=seed)


def _bits(
    place: load.Place, old: Lexicon, made: Extended, rows: widen.Rows, section: Vocab, seed: int, rest: list[str]
) -> dict[str, Any]:
    """Bits per byte of the base and of the grown, untrained model, on what was held out and on English."""
    size = sum(file.stat().st_size for pattern in load.WEIGHTS for file in Path(place.folder).glob(pattern))
    if 2.5 * size > psutil.virtual_memory().available:
        console.notice(
            say(
                f"bits per byte are not measured: the model ({console.human_bytes(size)}) does not fit into memory",
                f"不测 bits per byte：模型（{console.human_bytes(size)}）超出内存",
            )
        )
        return {}
    target, english = _chunks(rest), _chunks([measure.ENGLISH])
    with console.waiting(say("scoring before any training", "训练前评分")):
        model = load.load_model(place, load.compute_dtype("auto", "cpu")[0])
        before = [_score(model, old, old.tokenizer, texts) for texts in (target, english)]
        widen.widen_in_memory(model, rows, lambda read: _rows(made, rows, section, seed, read))
        after = [_score(model, made.lexicon, old.tokenizer, texts) for texts in (target, english)]
    return {
        "bits_per_byte": {
            say("base", "底座"): before[0],
            say("grown, untrained", "扩表后，未训练"): after[0],
            say("base, English", "底座，英文"): before[1],
            say("grown, untrained, English", "扩表后，未训练，英文"): after[1],
        }
    }


def _chunks(texts: list[str]) -> list[str]:
    """Stretches of CHUNK characters, evenly from all, SCORED characters together."""
    whole = "\n".join(texts)
    chunks = [whole[begin : begin + CHUNK] for begin in range(0, len(whole), CHUNK)]
    return chunks[:: max(1, len(whole) // SCORED)]


def _score(model: Any, one: Lexicon, tokenizer: Any, texts: list[str]) -> float:
    """Bits per byte of texts, each by itself behind the token that begins a text."""
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    coder = one.coder
    sizes = torch.tensor([len(piece) for piece in coder.spelling])

    def batches() -> Iterator[dict[str, Any]]:
        for ids in coder.encode(texts):
            whole = torch.tensor([[start, *ids] if start is not None else ids])
            count = whole.shape[1] - 1
            yield {"input_ids": whole, "rows": torch.arange(count), "targets": whole[0, 1:], "learned": count}

    return bits_per_byte(model, batches(), sizes)["bits_per_byte"]


def _advise(
    learnt: lexicon.Learnt, rest: list[str], base: str, section: Vocab, bits: dict[str, float] | None
) -> dict[str, Any]:
    """The curve and the advice, said before anything costs hours."""
    steps = sorted({*measure.CURVE, section.pieces})
    start, curve = lexicon.curve(learnt, rest, lexicon.shape_of(base), steps)
    damage = None
    if bits:
        before, after, *_ = bits.values()
        damage = after / before - 1
    advice = measure.advise(start, curve, damage, min(section.pieces, len(learnt)))
    said = console.good if advice.extend else console.notice
    said(
        say("it pays to extend this vocabulary", "扩充该词表是值得的")
        if advice.extend
        else say(
            "it does not pay to extend this vocabulary: leave `vocab` out of the recipe, and train on the base as it is",
            "扩充该词表不值得：请从配方中去掉 `vocab`，直接训练原底座",
        )
    )
    for reason in advice.reasons:
        console.tell(f"  · {reason}")
    return {"curve": [vars(point) for point in (start, *curve)], "advice": advice.to_dict()}


def _carry(place: load.Place, out: Path) -> None:
    """What the base says beside its weights: how to generate."""
    file = Path(place.folder) / "generation_config.json"
    if file.is_file():
        shutil.copyfile(file, out / file.name)


def _say_rows(rows: widen.Rows, out: Path) -> None:
    console.good(
        say(
            f"{len(rows.new):,} new tokens: {rows.filled:,} in spare rows, the matrices grew by {rows.added:,} to {rows.wanted:,} · {out}",
            f"{len(rows.new):,} 个新词：{rows.filled:,} 个用了空行，矩阵增加 {rows.added:,} 行至 {rows.wanted:,} 行 · {out}",
        )
    )
