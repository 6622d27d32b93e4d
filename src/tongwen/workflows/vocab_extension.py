"""Extending a vocabulary: prepared text and a base in; the base with a larger vocabulary out, its tokenizer and its rows.

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

from tongwen.core import artifact, console
from tongwen.core.i18n import _
from tongwen.core.safetensors_io import Tensors
from tongwen.data.prepare_steps import load_records
from tongwen.model.loading import load
from tongwen.model.loading.fingerprint import combine, model_lines
from tongwen.model.loading.tensors import open_model, read_fp32
from tongwen.model.merging import resize
from tongwen.recipe.data import Vocab
from tongwen.recipe.schema import Recipe
from tongwen.vocab import measure
from tongwen.vocab.report import as_html
from tongwen.vocab.script import Script
from tongwen.workflows import tokenizer_files, vocab_scores
from tongwen.workflows.tokenizer_files import TokenizerFiles

NEW_ROWS = "new_rows.json"


def extend_vocabulary(recipe: Recipe, settings: dict[str, Any], out: Path) -> artifact.Artifact:
    """Learn, measure, advise, write. settings: those that decide what comes out."""
    section = recipe.vocab
    assert section
    prepared = artifact.open_artifact(out.parent / "prepare", "prepare") if recipe.prepare else None
    place = load.ensure_local(load.locate(recipe.base))
    console.header("vocab", f"{recipe.base} + {section.tokenizer or format(section.pieces, ',')}")
    old, script = tokenizer_files.open_tokenizer_files(recipe.base), Script(section.script)
    learn_from, rest = _texts(prepared.path if prepared else None)
    learnt = None if section.tokenizer else _learn(old, learn_from, script, section)
    if learnt is not None:
        made = learnt.extended(section.pieces, section.words, section.special_tokens)
    else:
        made = tokenizer_files.extended_by(old, str(section.tokenizer))

    base, config = open_model(place)
    names = resize.matrices_of(base, place.name)
    rows = resize.plan_rows(
        made.first_new, made.new_ids, base.facts[names[0]][1][0], section.pad_to_multiple, shrink=section.shrink
    )
    report = measure.survey(old.coder, made.lexicon.coder, {_("held out"): rest}, script)
    report["rows"] = {"filled": rows.filled, "added": rows.added, "padding": rows.padding, "wanted": rows.wanted}
    if section.measure_bits:
        report |= vocab_scores.bits_before_training(place, old, made, section.new_rows, recipe.seed, rest)
    if learnt is not None and section.pieces:
        report |= _advise(learnt, rest, recipe.base, section, report.get("bits_per_byte"))
    report["summary"] = f"{recipe.base} · {_('{pieces:,} pieces').format(pieces=len(made.parts))} · {section.new_rows}"

    base_lines = model_lines(place)
    parents: dict[str, Any] = {"base": {"path": recipe.base, "fingerprint": combine(base_lines)}}
    if prepared:
        parents["prepare"] = prepared.as_parent()
    with artifact.create(out, "vocab", parents, settings, swept=True) as draft:
        artifact.check_disk(draft.path, resize.bytes_needed(base, names, rows))
        tokenizer_files.save(made.lexicon, draft.path)
        with console.progress(len(base.facts), "grow") as bar:
            known = {} if place.gguf else base_lines  # a GGUF file names its tensors otherwise
            make = _maker(base, made, rows, recipe)
            lines = resize.widen(base, known, names, rows, make, draft.path, bar.update)
        artifact.write_json(draft.path / "config.json", config | {"vocab_size": rows.wanted})
        _carry(place, draft.path)
        artifact.write_json(draft.path / NEW_ROWS, list(made.new_ids))
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
        return [], tokenizer_files.shipped_texts()
    kind = "documents" if (prepared / "documents.jsonl").is_file() else "dialogues"
    texts = _read(prepared / f"{kind}.jsonl")
    aside = prepared / f"{kind}.held_out.jsonl"
    if aside.is_file():
        return texts, tokenizer_files.some(_read(aside))
    return tokenizer_files.split(texts)


def _read(file: Path) -> Iterator[str]:
    for record in load_records(file):
        yield from tokenizer_files.texts_of(record)


def _learn(old: TokenizerFiles, texts: Iterable[str], script: Script, section: Vocab) -> tokenizer_files.LearnedPieces:
    """Enough pieces for the recipe and for the curve."""
    if not section.pieces:
        return tokenizer_files.learn(old, (), script, 0)
    most = max(section.pieces, measure.CURVE[-1])
    with console.progress(most, _("learning pieces")) as bar:
        learnt = tokenizer_files.learn(old, texts, script, most, bar.update)
    learnt.say_if_fewer(section.pieces)
    return learnt


def _maker(
    base: Tensors, made: tokenizer_files.ExtendedTokenizer, rows: resize.RowPlan, recipe: Recipe
) -> resize.MakeRows:
    """The rows of a matrix by its name: those of the new tokens, then the padding."""
    kind = recipe.vocab.new_rows if recipe.vocab else ""

    def make(name: str) -> Iterator[Any]:
        return vocab_scores.iter_rows(
            kind, made, rows, recipe.seed, lambda begin, end: read_fp32(base, name, begin, end)
        )

    return make


def _advise(
    learnt: tokenizer_files.LearnedPieces, rest: list[str], base: str, section: Vocab, bits: dict[str, float] | None
) -> dict[str, Any]:
    """The curve and the advice, said before anything costs hours."""
    steps = sorted({*measure.CURVE, section.pieces})
    start, curve = tokenizer_files.curve(learnt, rest, tokenizer_files.shape_of(base), steps)
    advice = measure.advise(start, curve, vocab_scores.damage_of(bits), min(section.pieces, len(learnt)))
    said = console.good if advice.extend else console.notice
    said(
        _("extending this vocabulary is worthwhile")
        if advice.extend
        else _(
            "extending this vocabulary is not worthwhile: leave `vocab` out of the recipe and train on the base as it is"
        )
    )
    for reason in advice.reasons:
        console.tell(f"  · {reason}")
    return {"curve": [vars(point) for point in (start, *curve)], "advice": advice.to_dict()}


def _carry(place: load.ModelRef, out: Path) -> None:
    """What the base says beside its weights: how to generate."""
    file = Path(place.folder) / "generation_config.json"
    if file.is_file():
        shutil.copyfile(file, out / file.name)


def _say_rows(rows: resize.RowPlan, out: Path) -> None:
    console.good(
        _(
            "{count:,} new tokens: {filled:,} use spare rows, the matrices grew by {added:,} to {wanted:,} rows · {out}"
        ).format(count=len(rows.new), filled=rows.filled, added=rows.added, wanted=rows.wanted, out=out)
    )
