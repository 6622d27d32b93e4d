"""Pieces of one SentencePiece model put behind another's, which merges the neighbours whose piece has the highest score.

- default: only pieces that spell the target script, scored below the base's, most wanted first, with the steps that longer
  ones need, and none that can never be produced. Text without the script keeps its ids, and a fast tokenizer gives the same ids everywhere.
- legacy: all pieces of the other model with score 0, as Chinese-LLaMA-Alpaca did in 2023; the file is the same to the
  byte. New pieces then come before all of the base's, also in its own languages, and one common score is an order that
  a fast tokenizer cannot express.
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
EXACT = float(1 << 23)  # up to here 32-bit floats tell whole scores apart; LLaMA's runs of blanks lie far below
Encode = Callable[[Sequence[str]], list[list[int]]]


@dataclass
class MergedPieces:
    """model: a new ModelProto; added: its new pieces; steps: those of them that were made for longer ones to be built from;
    left_out: reason -> pieces that were not taken."""

    model: Any
    added: list[str] = field(default_factory=list)
    steps: list[str] = field(default_factory=list)
    left_out: dict[str, list[str]] = field(default_factory=dict)

    def append(self, piece: str, score: float) -> None:
        entry = self.model.pieces.add()
        entry.piece, entry.score = piece, score
        self.added.append(piece)

    def append_control(self, name: str) -> None:
        """A special token: text never becomes it."""
        self.append(name, 0.0)
        self.model.pieces[-1].type = self.model.pieces[-1].CONTROL

    def leave_out(self, reason: str, pieces: Iterable[str]) -> None:
        if found := list(pieces):
            self.left_out.setdefault(reason, []).extend(found)


def merge_as_2023(base: Any, other: Any, *, keep_scores: bool, pad: bool = False) -> MergedPieces:
    """All pieces of `other` that `base` lacks (ModelProtos), in their order, with score 0 or their own."""
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
    """At most `pieces` of the candidates (most wanted first) that spell the script and can be produced, then `words`,
    whatever they spell, with the pieces that each is built from.

    encoder_of: SentencePiece's own encoder for a ModelProto. Raises ModelError when the base is no BPE model, when two
    scores could not be told apart, or when nothing is left to add.
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
        wanted = _producible(out, base, wanted[:pieces], encoder_of)  # some may have been built from those beyond
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
    """Raise ModelError when a model's pieces are not merged in an order."""
    if base.trainer_spec.model_type != BPE:
        raise ModelError(
            _("the base is a unigram model; pieces can only be added to BPE"),
            place=place,
            remedy=_("use a base such as LLaMA or Mistral"),
        )


def allows(script: Script, piece: str) -> bool:
    """Whether a piece is characters of the script, all letters or all marks; letters may have one blank before them."""
    return script.spells(piece) or (piece.startswith(BLANK) and script.spells(piece[1:]) and script.occurs_in(piece))


def learn_pieces(
    base: Any,
    texts: Iterable[str],
    script: Script,
    encode: Encode,
    pieces: int,
    progress: Callable[[int], None] = lambda done: None,
) -> list[tuple[str, int]]:
    """Pieces learned from a corpus by continuing the base's merges, most useful first, each with the tokens it saves.

    A character that the base writes as bytes must become a piece before any longer one; it saves its bytes but one,
    a merge saves one token, each time it occurs. Raises DataError when the corpus holds nothing of the script.
    """
    runs = Counter[str]()
    for text in texts:
        runs.update(script.runs(text))
    if not runs:
        raise no_text_in_script(script)
    spelling = spelling_of(base)
    missing, words = _as_tokens(base, runs, encode, spelling)
    learned = learn_merges(
        words,
        spelling,
        lambda piece: _allows_bytes(script, piece),
        pieces,
        first_new=len(spelling),
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


def spelling_of(model: Any) -> list[bytes]:
    """The bytes of every piece by id."""
    return [
        bytes([int(piece.piece[3:5], 16)])
        if piece.type == piece.BYTE
        else piece.piece.replace(BLANK, " ").encode("utf-8")
        for piece in model.pieces
    ]


def disagreement(encode: Encode, fast: Encode, texts: Sequence[str]) -> list[int]:
    """Places of the texts to which the model and its fast form give different ids."""
    return [
        place for place, (ours, theirs) in enumerate(zip(encode(texts), fast(texts), strict=True)) if ours != theirs
    ]


def _as_tokens(
    base: Any, runs: Counter[str], encode: Encode, spelling: list[bytes]
) -> tuple[dict[str, int], dict[tuple[int, ...], int]]:
    """The runs as tokens of the base, in which a character that it writes as bytes is one token of its own, put behind
    the others in `spelling`. Also what each such character would save as a piece."""
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
            waiting += spelling[token]
            try:
                character = waiting.decode("utf-8")
            except UnicodeDecodeError:
                continue
            if waiting not in places:
                places[waiting] = len(spelling)
                spelling.append(waiting)
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
    """A copy that puts no blank before a text: a stretch is then encoded as it is in the middle of one."""
    out = _copy(model)
    out.normalizer_spec.add_dummy_prefix = False
    out.normalizer_spec.remove_extra_whitespaces = False
    return out


def _producible(out: MergedPieces, base: Any, pieces: list[str], encoder_of: Callable[[Any], Encode]) -> list[str]:
    """The pieces that their own text gives; the others are noted. Whatever stands around a piece can only take parts of
    it away, and what is never produced is never a part: one look is enough."""
    trial = MergedPieces(without_prefix(base))
    _append_below(trial, pieces)
    encoded = encoder_of(trial.model)([piece.replace(BLANK, " ") for piece in pieces])
    first = len(base.pieces)
    kept = [piece for place, (piece, ids) in enumerate(zip(pieces, encoded, strict=True)) if ids == [first + place]]
    out.leave_out("never_produced", sorted(set(pieces) - set(kept), key=pieces.index))
    return kept


def _steps_to(pieces: list[str], known: set[str]) -> list[str]:
    """For each piece that no two known ones make, the one piece that is missing and not among them: 拿大 for 加拿大."""
    steps: dict[str, None] = {}
    for piece in pieces:
        halves = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
        missing = [[half for half in pair if half not in known and half not in steps] for pair in halves]
        fewest = min(missing, key=len, default=[])
        if len(fewest) == 1:
            steps[fewest[0]] = None
    return [step for step in steps if step not in set(pieces)]


def _append_word(out: MergedPieces, word: str, encoder_of: Callable[[Any], Encode]) -> None:
    """A word, and what is missing between its tokens and itself, joined from the left."""
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
    """Append pieces with falling scores below all that the base ranks."""
    lowest = min(piece.score for piece in out.model.pieces if piece.score > -EXACT)
    if lowest - len(pieces) <= -EXACT:
        raise ModelError(_("scores below {lowest:g} are indistinguishable").format(lowest=lowest), place="--base")
    for place, piece in enumerate(pieces):
        out.append(piece, float(int(lowest) - 1 - place))


def _copy(model: Any) -> Any:
    out = type(model)()
    out.CopyFrom(model)
    return out
