"""tokenizer train | extend | merge | report: work on tokenizers without a model's weights.

Each takes files or models by name and writes a folder that transformers opens (`tokenizer.json`, and `tokenizer.model` if
the family has one), with a manifest that names its sources.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tongwen.core import artifact, console, originals
from tongwen.core.errors import ModelError
from tongwen.core.i18n import _
from tongwen.model.loading import sentencepiece
from tongwen.model.loading.locate import ensure_local, locate
from tongwen.vocab import measure, spm, train
from tongwen.vocab.report import as_html
from tongwen.vocab.script import Script
from tongwen.workflows import tokenizer_files, vocab_curve, vocab_pieces, vocab_scores, vocab_texts
from tongwen.workflows.new_rows import NEW_ROWS
from tongwen.workflows.tokenizer_files import TokenizerFiles


def run_train(corpus: list[str], kind: str, pieces: int, out: str, seed: int, *, again: bool) -> int:
    """Train a tokenizer from scratch."""
    target = _target(out, corpus, again)
    texts = vocab_texts.iter_texts(corpus)
    with console.waiting(_("learning a tokenizer")):
        if kind == "byte-bpe":
            result = TokenizerFiles(out, train.train_byte_level(texts, pieces))
        else:
            model = sentencepiece.parse(train.train_sentencepiece(texts, pieces, kind.removeprefix("sp-"), seed), out)
            result = TokenizerFiles(out, sentencepiece.fast_form(model), model)
    settings = {"corpus": corpus, "kind": kind, "pieces": pieces, "seed": seed}
    return _finish(result, target, {}, settings, {"sizes": {"after": result.coder.size}})


def run_extend(
    base: str,
    corpus: list[str],
    pieces: int,
    out: str,
    *,
    script: str,
    words: Sequence[str],
    special_tokens: Sequence[str],
    again: bool,
) -> int:
    """Extend a base's tokenizer with pieces learned from nine tenths of a corpus; the rest measures their benefit."""
    target = _target(out, [base, *corpus], again)
    opened = tokenizer_files.open_tokenizer_files(base)
    console.header("tokenizer extend", f"{base} + {pieces:,}")
    learn_from, rest = vocab_texts.split(vocab_texts.iter_texts(corpus))
    with console.progress(pieces, _("learning")) as bar:
        learned = vocab_pieces.learn(opened, learn_from, Script(script), pieces, bar.update)
    result = learned.extended(pieces, words, special_tokens)
    learned.warn_if_fewer(pieces)
    found = measure.survey(opened.coder, result.files.coder, {_("held out"): rest}, Script(script))
    _note_fast(result.files, rest, found)
    _show(found)
    settings = {
        "base": base,
        "corpus": corpus,
        "pieces": pieces,
        "script": script,
        "words": list(words),
        "special_tokens": list(special_tokens),
    }
    return _finish(result.files, target, _parent(opened), settings, found, new_rows=result.new_ids)


def run_merge(base: str, add: str, mode: str, out: str, *, pad: bool, script: str, again: bool) -> int:
    """Append one SentencePiece model's pieces to another's."""
    target = _target(out, [base, add], again)
    opened, other = tokenizer_files.open_tokenizer_files(base), tokenizer_files.open_tokenizer_files(add)
    for flag, one in (("--base", opened), ("--add", other)):
        if one.model is None:
            raise ModelError(
                _("{one} is byte-level BPE; only SentencePiece models can be merged").format(one=one.name),
                place=flag,
                remedy=f"tongwen tokenizer extend --base {base} --corpus FILE --pieces 2000 --out {out}",
            )
    console.header("tokenizer merge", f"{base} + {add} · {mode}")
    if mode == "default":
        names = [piece.piece for piece in other.model.pieces]
        merged = spm.merge(opened.model, names, Script(script), tokenizer_files.encoder_of, pad=pad)
    else:
        merged = spm.merge_as_2023(opened.model, other.model, keep_scores=mode == "keep-scores", pad=pad)
    result = tokenizer_files.from_model(opened, merged.model)
    reasons = {
        "already_there": _("already in the base"),
        "other_script": _("digits, Latin letters or mixed: they would change old text"),
        "never_produced": _("can never be produced"),
    }
    rows = [(_("pieces of the base"), len(opened.model.pieces))]
    rows += [(_("pieces of the other model"), len(other.model.pieces))]
    rows += [(f"  − {reasons[reason]}", len(left)) for reason, left in merged.left_out.items()]
    if merged.steps:
        rows += [(_("  + intermediate pieces of longer words"), len(merged.steps))]
    rows += [(_("added"), len(merged.added)), (_("together"), len(merged.model.pieces))]
    console.table(("", _("pieces")), rows)
    samples = vocab_texts.shipped_texts()
    found = measure.survey(opened.coder, result.coder, {_("shipped dialogues"): samples}, Script(script))
    found["left_out"] = {reason: len(left) for reason, left in merged.left_out.items()}
    _note_fast(result, [*samples, *(piece.replace(spm.BLANK, " ") for piece in merged.added)], found)
    _show(found)
    settings = {"base": base, "add": add, "mode": mode, "pad": pad, "script": script}
    parents = {**_parent(opened), "add": {"path": add, "fingerprint": _digest(other)}}
    return _finish(result, target, parents, settings, found)


def run_report(base: str, other: str, texts: list[str], out: str, script: str) -> int:
    """Measure a tokenizer on texts: against another one, or against itself with pieces learned from the same texts."""
    folder, inputs = Path(out), [base, other, *texts]
    if out:
        originals.check_sealed(folder / "report.html", inputs)
    opened = tokenizer_files.open_tokenizer_files(base, to_measure=True)
    console.header("tokenizer report", f"{base} {other}".strip())
    script_filter = Script(script)
    by_file = {name: vocab_texts.sample_texts(vocab_texts.iter_texts([name])) for name in texts}
    if other:
        found = measure.survey(
            opened.coder, tokenizer_files.open_tokenizer_files(other, to_measure=True).coder, by_file, script_filter
        )
    else:
        found = measure.survey(opened.coder, None, by_file, script_filter)
    if not other and not opened.is_extensible:
        console.notice(_("a tokenizer of this kind cannot take new pieces"))
    elif not other:
        learn_from, rest = vocab_texts.split(
            vocab_texts.iter_texts(texts, lambda message: None)
        )  # its notices were printed above
        shape = vocab_curve.shape_of(base)
        learned = vocab_pieces.learn(opened, learn_from, script_filter, measure.CURVE[-1])
        start, curve = vocab_curve.curve(learned, rest, shape)
        advice = measure.advise(start, curve)
        if shape is measure.NOMINAL:
            console.notice(
                _(
                    "this tokenizer has no model: the cost is estimated for an 8B model, and bits per byte are not measured"
                )
            )
        else:
            model_ref, result = ensure_local(locate(base)), learned.extended(advice.pieces)
            found |= vocab_scores.make_and_score(model_ref, opened, result, "subtoken_mean", 0, rest)[1]
            advice = measure.advise(start, curve, vocab_scores.damage_of(found.get("bits_per_byte")), advice.pieces)
        found |= {"curve": [vars(point) for point in (start, *curve)], "advice": advice.to_dict()}
    found["summary"] = f"{base} {'→ ' + other if other else ''} · {', '.join(texts)}"
    _show(found)
    if out:
        originals.write_new(folder / "report.json", artifact.as_json(found), inputs)
        originals.write_sealed(folder / "report.html", as_html(_("Vocabulary"), found), originals.HTML, inputs)
        console.success(str(folder / "report.html"))
    console.emit(found)
    return 0


def _target(out: str, inputs: Sequence[str], again: bool) -> Path:
    target = Path(out)
    originals.clear_path(target, inputs, again=again)
    return target


def _note_fast(result: TokenizerFiles, texts: list[str], found: dict[str, Any]) -> None:
    """Report where tokenizer.json encodes differently from tokenizer.model, which is authoritative."""
    if result.model is None:
        return
    differing = len(spm.disagreement(result.coder.encode, result.encode_fast, texts))
    found["kept"]["fast_disagrees"] = differing
    if differing:
        console.notice(
            _(
                "tokenizer.json gives other ids than tokenizer.model for {differing:,} of {count:,} texts: pieces with equal scores cannot be ranked. tokenizer.model is right: load it with SentencePiece, or merge with --mode default"
            ).format(differing=differing, count=len(texts))
        )


def _show(found: dict[str, Any]) -> None:
    rows = []
    for name, one in found["fertility"].items():
        before, after = one["before"], one.get("after")
        row = [name, f"{before['characters_per_token']:.3f}"]
        rows.append([*row, f"{after['characters_per_token']:.3f}"] if after else row)
    head = [_("characters per token"), _("before")]
    console.table([*head, _("after")] if len(rows[0]) > 2 else head, rows)
    if kept := found.get("kept"):
        texts, changed = kept["source_texts"], kept["source_changed"]
        (console.notice if changed else console.success)(
            _("{changed} of {texts:,} texts without the script get other ids").format(changed=changed, texts=texts)
        )
        failures, trips = kept["new_round_trip_failures"], kept["round_trips"]
        (console.notice if failures else console.success)(
            _("{failures} new round-trip failures in {trips:,} texts").format(failures=failures, trips=trips)
        )
        (console.notice if kept["unreachable"] else console.success)(
            _("{unreachable:,} of {pieces:,} new pieces can never be produced").format(
                unreachable=kept["unreachable"], pieces=kept["pieces"]
            )
        )
    if curve := found.get("curve"):
        columns = (
            _("pieces"),
            _("characters per token"),
            _("cost"),
            _("learnable"),
        )
        console.table(
            columns,
            [(p["pieces"], f"{p['characters_per_token']:.3f}", f"{p['cost']:.3f}", p["seen_enough"]) for p in curve],
        )
    if advice := found.get("advice"):
        verdict = _("extend") if advice["extend"] else _("do not extend")
        (console.success if advice["extend"] else console.notice)(f"{verdict}: {advice['pieces']:,}")
        for reason in advice["reasons"]:
            console.info(f"  · {reason}")


def _digest(one: TokenizerFiles) -> str:
    serialized = one.model.SerializeToString() if one.model is not None else one.backend.to_str().encode()
    return hashlib.sha256(serialized).hexdigest()


def _parent(base: TokenizerFiles) -> dict[str, Any]:
    return {"base": {"path": base.name, "fingerprint": _digest(base)}}


def _finish(
    result: TokenizerFiles,
    target: Path,
    parents: dict[str, Any],
    settings: dict[str, Any],
    report: dict[str, Any],
    new_rows: Sequence[int] = (),
) -> int:
    with artifact.create(target, "tokenizer", parents, settings) as draft:
        tokenizer_files.save(result, draft.path)
        artifact.write_json(draft.path / "report.json", report)
        if new_rows:
            artifact.write_json(draft.path / NEW_ROWS, list(new_rows))
        draft.fingerprint = _digest(result)
        draft.facts = {"tokens": result.coder.size, "files": _hashes(draft.path)}
    assert draft.artifact
    size = result.coder.size
    console.success(_("{size:,} tokens · {target}").format(size=size, target=target))
    for name in ("tokenizer.model", "tokenizer.json"):
        if digest := draft.facts["files"].get(name):
            console.info(f"  {digest}  {name}")
    console.emit({"out": str(target), **draft.artifact.manifest, "report": report})
    return 0


def _hashes(folder: Path) -> dict[str, str]:
    return {file.name: artifact.hash_file(file) for file in sorted(folder.glob("tokenizer.*"))}
