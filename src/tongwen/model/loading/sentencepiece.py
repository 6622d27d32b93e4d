"""Read SentencePiece models (`tokenizer.model`) and build a fast tokenizer (`tokenizer.json`) with the same ids.

transformers 5 ranks the pieces of such a file by position, but SentencePiece merges by score, and LLaMA's runs of
blanks (positions 259 and later, score -1e9) rank last. 17 of 20 English articles got different ids from a folder
without tokenizer.json. transformers also omits the blank before a text that begins with one. So we build our own.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, processors

from tongwen.core.errors import MissingPackage, ModelError
from tongwen.core.i18n import _
from tongwen.core.tokenizer_json import open_definition

BLANK = "\u2581"
UNIGRAM, BPE = 1, 2  # TrainerSpec.ModelType


def read_model(file: Path) -> Any:
    """Return a file's ModelProto. Raises ModelError for another file, MissingPackage without the package."""
    return parse(file.read_bytes(), str(file))


def parse(held: bytes, place: str) -> Any:
    """Like `read_model`, from the file's bytes."""
    try:
        from google.protobuf.message import DecodeError
        from sentencepiece import sentencepiece_model_pb2 as proto
    except ImportError:
        raise MissingPackage("sentencepiece", _("reading a SentencePiece model"), "sentencepiece") from None
    model: Any = proto.ModelProto()  # type: ignore[attr-defined]
    try:
        model.ParseFromString(held)
    except DecodeError:
        model.Clear()
    if not model.pieces or model.trainer_spec.model_type not in (UNIGRAM, BPE):
        raise ModelError(
            _("this is not a BPE or unigram SentencePiece model"),
            place=place,
            remedy=_("download the whole file again"),
        )
    return model


def is_of(file: Path, tokenizer: Path) -> bool:
    """Whether a tokenizer.model has the pieces of a tokenizer.json, at the same ids. Tokens that were added to the latter,
    which a SentencePiece model cannot hold, may lack. Raises MissingPackage, and ModelError for another file."""
    definition = json.loads(tokenizer.read_text(encoding="utf-8"))
    ids = open_definition(definition, str(tokenizer)).get_vocab(with_added_tokens=True)
    pieces = {piece.piece: index for index, piece in enumerate(read_model(file).pieces)}
    added = {token["content"] for token in definition["added_tokens"]}
    return all(ids.get(piece) == index for piece, index in pieces.items()) and ids.keys() - pieces.keys() <= added


def processor(model: Any) -> Any:
    """Return SentencePiece's own encoder for a ModelProto."""
    from sentencepiece import SentencePieceProcessor

    return SentencePieceProcessor(model_proto=model.SerializeToString())


def fast_form(model: Any) -> Tokenizer:
    """Build the model's tokenizer for the tokenizers library.

    Among pieces of equal score SentencePiece takes the leftmost, which ranks cannot express. There the two may differ
    (see `vocab.spm.disagreement`).
    """
    spec = model.trainer_spec
    names = [piece.piece for piece in model.pieces]
    unknown = names[spec.unk_id] if 0 <= spec.unk_id < len(names) else None
    tokenizer = Tokenizer(
        models.Unigram([(piece.piece, piece.score) for piece in model.pieces], spec.unk_id, spec.byte_fallback)
        if spec.model_type == UNIGRAM
        else models.BPE(
            vocab={name: index for index, name in enumerate(names)},
            merges=_merges(model),
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=spec.byte_fallback,
        )
    )
    tokenizer.normalizer = normalizer_of(model.normalizer_spec)
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace(BLANK, " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            *([decoders.Strip(" ", 1, 0)] if model.normalizer_spec.add_dummy_prefix else []),
        ]
    )
    tokenizer.add_tokens(
        [
            AddedToken(piece.piece, special=piece.type != piece.USER_DEFINED, normalized=False)
            for piece in model.pieces
            if piece.type in (piece.UNKNOWN, piece.CONTROL, piece.USER_DEFINED)
        ]
    )
    if 0 <= spec.bos_id < len(names):  # every family with such a file begins a text with bos
        begin = names[spec.bos_id]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{begin} $A", pair=f"{begin} $A {begin}:1 $B:1", special_tokens=[(begin, spec.bos_id)]
        )
    return tokenizer


def with_sentencepiece_ids(tokenizer: Any, file: Path) -> Any:
    """Replace transformers' tokenizer of a folder without tokenizer.json by one that gives SentencePiece's ids."""
    model = read_model(file)
    if model.trainer_spec.model_type != BPE:
        return tokenizer
    from transformers import PreTrainedTokenizerFast

    names = {name: text for name, text in tokenizer.special_tokens_map.items() if isinstance(text, str)}
    out = PreTrainedTokenizerFast(
        tokenizer_object=fast_form(model),
        model_max_length=tokenizer.model_max_length,
        clean_up_tokenization_spaces=False,
        **(special_names(model) | names),
    )
    out.chat_template = tokenizer.chat_template
    return out


def special_names(model: Any) -> dict[str, str]:
    """Return the file's special tokens under transformers' names."""
    spec, names = model.trainer_spec, [piece.piece for piece in model.pieces]
    ids = {"bos_token": spec.bos_id, "eos_token": spec.eos_id, "unk_token": spec.unk_id, "pad_token": spec.pad_id}
    return {name: names[index] for name, index in ids.items() if 0 <= index < len(names)}


def _merges(model: Any) -> list[tuple[str, str]]:
    """Return every way to build a piece from two others, by descending score."""
    scores = {piece.piece: piece.score for piece in model.pieces if piece.type in (piece.NORMAL, piece.USER_DEFINED)}
    out = [
        (score, name[:cut], name[cut:])
        for name, score in scores.items()
        for cut in range(1, len(name))
        if name[:cut] in scores and name[cut:] in scores
    ]
    out.sort(key=lambda one: (-one[0], -len(one[1]), -len(one[2])))
    return [(left, right) for _, left, right in out]


def normalizer_of(spec: Any) -> Any:
    steps: list[Any] = []
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    if spec.add_dummy_prefix:
        steps.append(normalizers.Prepend(BLANK))
    return normalizers.Sequence([*steps, normalizers.Replace(" ", BLANK)])
