"""Add pieces to a SentencePiece model, which merges the neighbours whose piece has the highest score.

- default: only pieces in the target script, with scores below the base's in the given order, with the intermediate
  pieces that longer ones need, and without pieces that can never be produced. Text without the script keeps its ids,
  and a fast tokenizer gives the same ids everywhere.
- legacy: all pieces of another model with score 0, as Chinese-LLaMA-Alpaca did in 2023; the file is equal to the byte.
  New pieces then take precedence over the base's, also in its own languages, and a fast tokenizer cannot express the
  order of pieces with one common score.
- keep-scores: the same with the other model's own scores, as BELLE did.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from tongwen.core.errors import ModelError
from tongwen.core.i18n import _
from tongwen.vocab.learn import learn_merges
from tongwen.vocab.script import Script, no_text_in_script

BLANK = "\u2581"
PAD = "[PAD]"
BPE = 2  # TrainerSpec.ModelType
EXACT = float(1 << 23)  # 32-bit floats distinguish whole scores up to here; LLaMA's runs of spaces are far below -EXACT
Encode = Callable[[Sequence[str]], list[list[int]]]


@dataclass
class MergedPieces:
    """model: a new ModelProto; added: its new pieces; steps: intermediate pieces among them, which longer ones need;
    left_out: reason -> pieces that were not added."""

    model: Any
    added: list[str] = field(default_factory=list)
    steps: list[str] = field(default_factory=list)
    left_out: dict[str, list[str]] = field(default_factory=dict)

    def append(self, piece: str, score: float) -> None:
        entry = self.model.pieces.add()
        entry.piece, entry.score = piece, score
        self.added.append(piece)

    def append_control(self, name: str) -> None:
        """Append a special token, which text never produces."""
        self.append(name, 0.0)
        self.model.pieces[-1].type = self.model.pieces[-1].CONTROL

    def leave_out(self, reason: str, pieces: Iterable[str]) -> None:
        if found := list(pieces):
            self.left_out.setdefault(reason, []).extend(found)


def merge_as_2023(base: Any, other: Any, *, keep_scores: bool, pad: bool = False) -> MergedPieces:
    """Append all pieces of `other` that `base` lacks (ModelProtos), in their order, with score 0 or their own."""
    out = MergedPieces(_copy(base))
    known = {piece.piece for piece in base.pieces}
    for piece in other.pieces:
        if piece.piece not in known:
            out.append(piece.piece, piece.score if keep_scores else 0.0)
    out.leave_out("already_there", (piece.piece for piece in other.pieces if piece.piece in known))
    if pad:
        out.append(PAD, 0.0)
    return out


def merge(
    base: Any,
    candidates: Iterable[str],
    script: Script,
    encoder_of: Callable[[Any], Encode],
    *,
    pieces: int | None = None,
    words: Sequence[str] = (),
    pad: bool = False,
) -> MergedPieces:
    """Append at most `pieces` of the candidates, most useful first, that are in the script and can be produced.

    words:      appended after them in any script, with the intermediate pieces that each needs
    encoder_of: returns SentencePiece's own encoder for a ModelProto
    Raises ModelError when the base is no BPE model, when two scores would be equal, or when nothing is left to add.
    """
    check_base(base, "--base")
    out = MergedPieces(_copy(base))
    known = {piece.piece for piece in base.pieces}
    wanted: list[str] = []
    for piece in dict.fromkeys(candidates):
        if piece in known:
            out.leave_out("already_there", [piece])
        elif not allows(script, piece):
            out.leave_out("other_script", [piece])
        else:
            wanted.append(piece)
    wanted = _producible(out, base, wanted, encoder_of)
    if pieces is None and (unbuilt := out.left_out.pop("never_produced", [])):
        steps = _steps_to(unbuilt, known | set(wanted))
        wanted = _producible(out, base, [*wanted, *steps, *unbuilt], encoder_of)
        out.steps = [piece for piece in wanted if piece in set(steps)]
        out.left_out["never_produced"] = [piece for piece in unbuilt if piece not in set(wanted)]
    if pieces is not None and len(wanted) > pieces:
        out.leave_out("beyond_pieces", wanted[pieces:])
        wanted = _producible(out, base, wanted[:pieces], encoder_of)  # some may need the pieces that were cut off
    if not wanted and not words:
        raise ModelError(
            _("there is no piece in the script {script!r} to add").format(script=script.name),
            place="--add",
        )
    _append_below(out, wanted)
    for word in words:
        _append_word(out, word.replace(" ", BLANK), encoder_of)
    if pad:
        out.append(PAD, 0.0)
    return out


def unchanged(base: Any) -> MergedPieces:
    return MergedPieces(_copy(base))


def check_base(base: Any, place: str) -> None:
    """Raise ModelError when the model is not BPE."""
    if base.trainer_spec.model_type != BPE:
        raise ModelError(
            _("the base is a unigram model; pieces can only be added to BPE"),
            place=place,
            remedy=_("use a base such as LLaMA or Mistral"),
        )


def allows(script: Script, piece: str) -> bool:
    """Whether a piece consists of letters of the script, with or without a leading space, or of its marks."""
    return script.spells(piece) or (piece.startswith(BLANK) and script.spells(piece[1:]) and script.occurs_in(piece))


def learn_pieces(
    base: Any,
    texts: Iterable[str],
    script: Script,
    encode: Encode,
    pieces: int,
    progress: Callable[[int], None] = lambda done: None,
) -> list[tuple[str, int]]:
    """Learn pieces by continuing the base's merges. Returns (piece, tokens saved), most useful first.

    A character that the base encodes as bytes must become a piece before any longer one. Per occurrence it saves all
    but one of its bytes; a merge saves one token. Raises DataError when the corpus has no text in the script.
    """
    runs = Counter[str]()
    for text in texts:
        runs.update(script.runs(text))
    if not runs:
        raise no_text_in_script(script)
    token_bytes = token_bytes_of(base)
    missing, words = _as_tokens(base, runs, encode, token_bytes)
    learned = learn_merges(
        words,
        token_bytes,
        lambda piece: _allows_bytes(script, piece),
        pieces,
        first_new=len(token_bytes),
        progress=progress,
    )
    made, gains = list[str](), list[int]()
    size = learned.first_new
    for (_unused, _unused2, result), count in zip(learned.merges, learned.counts, strict=True):
        if result == size + len(made):
            made.append(learned.pieces[result - size].decode("utf-8").replace(" ", BLANK))
            gains.append(count)
    found = [*missing.items(), *zip(made, gains, strict=True)]
    return sorted(found, key=lambda one: -one[1])[:pieces]


def token_bytes_of(model: Any) -> list[bytes]:
    """Return the bytes of every piece by id."""
    return [
        bytes([int(piece.piece[3:5], 16)])
        if piece.type == piece.BYTE
        else piece.piece.replace(BLANK, " ").encode("utf-8")
        for piece in model.pieces
    ]


def disagreement(encode: Encode, fast: Encode, texts: Sequence[str]) -> list[int]:
    """Return the indices of texts for which the model and its fast form give different ids."""
    return [
        place for place, (ours, theirs) in enumerate(zip(encode(texts), fast(texts), strict=True)) if ours != theirs
    ]


def _as_tokens(
    base: Any, runs: Counter[str], encode: Encode, token_bytes: list[bytes]
) -> tuple[dict[str, int], dict[tuple[int, ...], int]]:
    """Return (character -> tokens it would save as a piece, word -> count) for runs of text.

    A word is a tuple of the base's tokens. A character that the base encodes as bytes becomes one new token, which is
    appended to `token_bytes`; only such characters are in the first dict.
    """
    is_byte = [piece.type == piece.BYTE for piece in base.pieces]
    places: dict[bytes, int] = {}
    missing, words = Counter[str](), Counter[tuple[int, ...]]()
    for (run, count), ids in zip(runs.items(), encode(list(runs)), strict=True):
        word: list[int] = []
        waiting = b""
        for token in ids:
            if not is_byte[token]:
                word.append(token)
                continue
            waiting += token_bytes[token]
            try:
                character = waiting.decode("utf-8")
            except UnicodeDecodeError:
                continue
            if waiting not in places:
                places[waiting] = len(token_bytes)
                token_bytes.append(waiting)
            missing[character] += count * (len(waiting) - 1)
            word.append(places[waiting])
            waiting = b""
        assert not waiting, run
        words[tuple(word)] += count
    return dict(missing), {word: count for word, count in words.items() if len(word) > 1}


def _allows_bytes(script: Script, piece: bytes) -> bool:
    try:
        return allows(script, piece.decode("utf-8").replace(" ", BLANK))
    except UnicodeDecodeError:
        return False


def without_prefix(model: Any) -> Any:
    """Return a copy that puts no space before a text, so that a run is encoded as in the middle of a text."""
    out = _copy(model)
    out.normalizer_spec.add_dummy_prefix = False
    out.normalizer_spec.remove_extra_whitespaces = False
    return out


def _producible(out: MergedPieces, base: Any, pieces: list[str], encoder_of: Callable[[Any], Encode]) -> list[str]:
    """Return the pieces that their own text produces, and record the others as left out.

    Surrounding text can only take parts of a piece away, and a piece that is never produced is never a part of another.
    So one pass is enough.
    """
    trial = MergedPieces(without_prefix(base))
    _append_below(trial, pieces)
    encoded = encoder_of(trial.model)([piece.replace(BLANK, " ") for piece in pieces])
    first = len(base.pieces)
    kept = [piece for place, (piece, ids) in enumerate(zip(pieces, encoded, strict=True)) if ids == [first + place]]
    out.leave_out("never_produced", sorted(set(pieces) - set(kept), key=pieces.index))
    return kept


def _steps_to(pieces: list[str], known: set[str]) -> list[str]:
    """Return the missing intermediate pieces, for pieces that lack only one to be merged: 拿大 for 加拿大."""
    steps: dict[str, None] = {}
    for piece in pieces:
        halves = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
        missing = [[half for half in pair if half not in known and half not in steps] for pair in halves]
        fewest = min(missing, key=len, default=[])
        if len(fewest) == 1:
            steps[fewest[0]] = None
    return [step for step in steps if step not in set(pieces)]


def _append_word(out: MergedPieces, word: str, encoder_of: Callable[[Any], Encode]) -> None:
    """Append a word and the intermediate pieces from its tokens to the word, merged from the left."""
    text = word.replace(BLANK, " ")
    for _index in range(len(word)):
        ids = encoder_of(without_prefix(out.model))([text])[0]
        if len(ids) == 1:
            return
        names = [out.model.pieces[index] for index in ids]
        unknown = next((place for place, piece in enumerate(names) if piece.type in (piece.BYTE, piece.UNKNOWN)), None)
        if unknown is None:
            _append_below(out, ["".join(piece.piece for piece in names[:2])])
        else:  # a character must be a piece before it can be a part of one
            _append_below(out, [next(character for character in word if character not in _names(out.model))])
    raise ModelError(_("{text!r} cannot become one piece").format(text=text), place="vocab.words")


def _names(model: Any) -> set[str]:
    return {piece.piece for piece in model.pieces}


def _append_below(out: MergedPieces, pieces: Sequence[str]) -> None:
    """Append pieces with descending scores, below all scores of the base's ranked pieces."""
    lowest = min(piece.score for piece in out.model.pieces if piece.score > -EXACT)
    if lowest - len(pieces) <= -EXACT:
        raise ModelError(_("scores below {lowest:g} are indistinguishable").format(lowest=lowest), place="--base")
    for place, piece in enumerate(pieces):
        out.append(piece, float(int(lowest) - 1 - place))


def _copy(model: Any) -> Any:
    out = type(model)()
    out.CopyFrom(model)
    return out
