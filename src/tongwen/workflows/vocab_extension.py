"""Extend a base's vocabulary with pieces learned from prepared text; write the larger model and its tokenizer.

Pieces are learned from the rows that `prepare` kept, and measured on the rows that it held out. Before anything is
written, a report advises whether text becomes cheap enough to pay for training the new rows. Then the tokenizer is
written in all its forms, and the weights are streamed with the new rows after the old ones. The result is an ordinary
model folder; `new_rows.json` lists the rows that have to be trained.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from tongwen.core import artifact, console
from tongwen.core.i18n import _
from tongwen.core.safetensors_io import ITEM_BYTES, TensorSource
from tongwen.data.input_parts import KINDS
from tongwen.data.prepare_steps import load_records
from tongwen.model.adapters.read import HEADS
from tongwen.model.loading.fingerprint import combine, tensor_digests
from tongwen.model.loading.locate import ensure_local, locate
from tongwen.model.loading.model_ref import ModelRef
from tongwen.model.loading.tensors import open_model, read_fp32
from tongwen.model.merging import resize
from tongwen.model.merging.merge import grow, untie
from tongwen.recipe.data import Vocab
from tongwen.recipe.schema import Recipe
from tongwen.vocab import measure
from tongwen.vocab.report import as_html
from tongwen.vocab.script import Script
from tongwen.workflows import tokenizer_files, vocab_curve, vocab_pieces, vocab_scores, vocab_texts
from tongwen.workflows.new_rows import NEW_ROWS
from tongwen.workflows.tokenizer_files import TokenizerFiles


def extend_vocabulary(recipe: Recipe, settings: dict[str, Any], out: Path) -> artifact.Artifact:
    """Learn pieces, measure them, print advice, write the model. settings: recorded in the manifest."""
    section = recipe.vocab
    assert section
    prepared = artifact.open_artifact(out.parent / "prepare", "prepare") if recipe.prepare else None
    place = ensure_local(locate(recipe.base))
    console.header("vocab", f"{recipe.base} + {section.tokenizer or format(section.pieces, ',')}")
    old, script = tokenizer_files.open_tokenizer_files(recipe.base), Script(section.script)
    learn_from, rest = _texts(prepared.path if prepared else None)
    learned = None if section.tokenizer else _learn(old, learn_from, script, section)
    if learned is not None:
        extended = learned.extended(section.pieces, section.words, section.special_tokens)
    else:
        extended = vocab_pieces.extended_by(old, str(section.tokenizer))

    base, config = open_model(place)
    new, scores = vocab_scores.make_and_score(
        place,
        old,
        extended,
        section.new_rows,
        recipe.seed,
        rest,
        sample=_sample(prepared.path if prepared else None) if section.new_rows == vocab_scores.MATCHED else (),
        score=section.measure_bits,
    )
    if new.matched:
        _report_matched(new.matched.report, scores.get("bits_per_byte"))
    if new.matched and new.matched.untied:
        base = _untie(base, config, new.matched.untied, place.name)
    names = resize.matrices_of(base, place.name)
    rows = resize.plan_rows(
        extended.first_new, extended.new_ids, base.facts[names[0]][1][0], section.pad_to_multiple, shrink=section.shrink
    )
    report = measure.survey(old.coder, extended.files.coder, {_("held out"): rest}, script)
    report["rows"] = {"filled": rows.filled, "added": rows.added, "padding": rows.padding, "wanted": rows.wanted}
    report |= scores
    if learned is not None and section.pieces:
        report |= _advise(learned, rest, recipe.base, section, report.get("bits_per_byte"))
    report["summary"] = f"{recipe.base} · {_('{pieces:,} pieces').format(pieces=len(extended.parts))} · {new.kind}"

    base_digests = tensor_digests(place)
    parents: dict[str, Any] = {"base": {"path": recipe.base, "fingerprint": combine(base_digests)}}
    if prepared:
        parents["prepare"] = prepared.as_parent()
    with artifact.create(out, "vocab", parents, settings, remove_on_error=True) as draft:
        artifact.check_disk(draft.path, resize.bytes_needed(base, names, rows))
        tokenizer_files.save(extended.files, draft.path)
        with console.progress(len(base.facts), "grow") as bar:
            known = {} if place.gguf else base_digests  # a GGUF file names its tensors otherwise
            make = _maker(base, rows, new)
            replaced = {names[-1]: new.matched.stays} if new.matched else {}
            lines = resize.resize_vocabulary(base, known, names, rows, make, draft.path, bar.update, replaced)
        grow(config, rows.wanted)
        artifact.write_json(draft.path / "config.json", config)
        _copy_generation_config(place, draft.path)
        artifact.write_json(draft.path / NEW_ROWS, list(extended.new_ids))
        artifact.write_json(draft.path / "report.json", report)
        title = f"{recipe.name} · vocab"
        (draft.path / "report.html").write_text(as_html(title, report), encoding="utf-8")
        draft.fingerprint = combine(lines)
        draft.facts = {"tokens": report["sizes"], "rows": report["rows"], "tensors": lines}
        draft.facts["changed_head"] = sorted(new.matched.stays) if new.matched else []
        draft.record_files(lambda file: file.suffix != ".safetensors")
    _report_rows(rows, out)
    assert draft.artifact
    return draft.artifact


def _texts(prepared: Path | None) -> tuple[Iterable[str], list[str]]:
    """Return (texts to learn from, texts to measure on): documents, else dialogues, else preferences; held-out texts, or
    every tenth text if none were held out."""
    if prepared is None:
        return [], vocab_texts.shipped_texts()
    kind = next(kind for kind in KINDS if (prepared / f"{kind}.jsonl").is_file())
    texts = _read(prepared / f"{kind}.jsonl")
    aside = prepared / f"{kind}.held_out.jsonl"
    if aside.is_file():
        return texts, vocab_texts.sample_texts(_read(aside))
    return vocab_texts.split(texts)


def _read(file: Path) -> Iterator[str]:
    for record in load_records(file):
        yield from vocab_texts.texts_of(record)


def _learn(old: TokenizerFiles, texts: Iterable[str], script: Script, section: Vocab) -> vocab_pieces.LearnedPieces:
    """Learn enough pieces for the recipe and for the curve."""
    if not section.pieces:
        return vocab_pieces.learn(old, (), script, 0)
    most = max(section.pieces, measure.CURVE[-1])
    with console.progress(most, _("learning pieces")) as bar:
        learned = vocab_pieces.learn(old, texts, script, most, bar.update)
    learned.warn_if_fewer(section.pieces)
    return learned


def _sample(prepared: Path | None) -> list[str]:
    """Return texts of those that pieces are learned from, spread evenly, without holding all of them."""
    kept: list[str] = []
    step, size = 1, 0
    for number, text in enumerate(_texts(prepared)[0]):
        if number % step:
            continue
        kept.append(text)
        size += len(text)
        if size > vocab_texts.SAMPLE_CHARACTERS and len(kept) > 1:
            kept, step = kept[::2], 2 * step
            size = sum(map(len, kept))
    return kept


def _report_matched(found: dict[str, Any], bits: dict[str, float] | None) -> None:
    """Say what matching took and brought, and which rows no text has shown."""
    console.info(
        _(
            "  · rows matched on {old:,} old and {new:,} new tokens in {seconds:,.0f} CPU seconds; {unseen:,} pieces do not occur there: the map that all pieces share makes their rows"
        ).format(old=found["old_tokens"], new=found["new_tokens"], seconds=found["cpu_seconds"], unseen=found["unseen"])
    )
    if bits:
        before, after, *_unused = bits.values()
        console.info(
            _("  · bits per byte: {before:.3f} of the base, {after:.3f} of the extended, untrained model").format(
                before=before, after=after
            )
        )


def _untie(base: TensorSource, config: dict[str, Any], head: str, place: str) -> TensorSource:
    """Give the model a head of its own."""
    embedding = resize.matrices_of(base, place)[0]
    dtype, (rows, width) = base.facts[embedding]
    untie(config)
    say_untied(rows, width, ITEM_BYTES[dtype])
    return base if head in base.facts else resize.with_separate_head(base, head, embedding)


def say_untied(rows: int, width: int, itemsize: int) -> None:
    """Say what a head of its own costs."""
    console.notice(
        _(
            "`new_rows: matched` unties the head from the embedding: {count} more parameters, {size} more on disk and in memory"
        ).format(count=console.human_count(rows * width), size=console.human_bytes(rows * width * itemsize))
    )


def _maker(base: TensorSource, rows: resize.RowPlan, new: vocab_scores.NewRows) -> resize.MakeRows:
    """Return a function from a matrix's name to its new rows: those of the new tokens, then the padding."""
    return lambda name: new.blocks(rows, name.endswith(HEADS), lambda begin, end: read_fp32(base, name, begin, end))


def _advise(
    learned: vocab_pieces.LearnedPieces, rest: list[str], base: str, section: Vocab, bits: dict[str, float] | None
) -> dict[str, Any]:
    """Print the advice, and return it with the curve; this comes before the steps that take hours."""
    steps = sorted({*measure.CURVE, section.pieces})
    start, curve = vocab_curve.curve(learned, rest, vocab_curve.shape_of(base), steps)
    advice = measure.advise(start, curve, vocab_scores.damage_of(bits), min(section.pieces, len(learned)))
    report = console.success if advice.extend else console.notice
    report(
        _("extending this vocabulary is worthwhile")
        if advice.extend
        else _(
            "extending this vocabulary is not worthwhile: leave `vocab` out of the recipe and train on the base as it is"
        )
    )
    for reason in advice.reasons:
        console.info(f"  · {reason}")
    return {"curve": [vars(point) for point in (start, *curve)], "advice": advice.to_dict()}


def _copy_generation_config(place: ModelRef, out: Path) -> None:
    """Copy the base's generation_config.json, if it has one."""
    file = Path(place.folder) / "generation_config.json"
    if file.is_file():
        shutil.copyfile(file, out / file.name)


def _report_rows(rows: resize.RowPlan, out: Path) -> None:
    console.success(
        _(
            "{count:,} new tokens: {filled:,} use spare rows, the matrices grew by {added:,} to {wanted:,} rows · {out}"
        ).format(count=len(rows.new), filled=rows.filled, added=rows.added, wanted=rows.wanted, out=out)
    )
