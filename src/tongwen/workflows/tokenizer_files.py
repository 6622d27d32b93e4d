"""Open a tokenizer of any kind by name, extend it, and save it as the files of its family.

Two kinds can be extended. SentencePiece (LLaMA, Mistral): `tokenizer.model` is authoritative, and the fast form is made
from it. Byte-level BPE (Llama-3, Qwen, SmolLM2): there is only tokenizer.json.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from importlib import resources
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from tongwen.core import console
from tongwen.core.artifact import read_json, write_json
from tongwen.core.errors import DataError, ModelError, RecipeError, RowRejected
from tongwen.core.i18n import _
from tongwen.core.records import Dialogue, Document, Preference, Record
from tongwen.core.tokenizer_json import open_definition
from tongwen.data.clean import Cleaner
from tongwen.data.input_parts import kind_of, list_parts
from tongwen.data.prepare_steps import iter_rows
from tongwen.hub.download import local_copy
from tongwen.model.loading import limits, load, sentencepiece
from tongwen.model.loading.tiktoken import read_ranks
from tongwen.recipe.data import Clean, Prepare, SourceConfig
from tongwen.vocab import bytelevel, spm
from tongwen.vocab.learn import LearnedMerges, learn_merges
from tongwen.vocab.measure import CURVE, NOMINAL, SEEN_ENOUGH, CurvePoint, MeasuredTokenizer, ModelSize, make_curve
from tongwen.vocab.script import Script

NO_CLEANING = Clean(unicode=False, control=False, mojibake=False, html=False, unwrap=False, repetition=False)
INPUTS = ["input_ids", "attention_mask"]
SAMPLE_CHARACTERS = 1_000_000  # most characters to measure: takes seconds


@dataclass(frozen=True)
class TokenizerFiles:
    """A tokenizer in all its forms.

    backend: the fast form; model: the SentencePiece ModelProto, if any; tokenizer: transformers' object with chat
    template and special tokens, if it was opened from a model and not from a file.
    """

    name: str
    backend: Tokenizer
    model: Any = None
    tokenizer: Any = None

    @property
    def coder(self) -> MeasuredTokenizer:
        """The form that is measured: SentencePiece itself if there is a SentencePiece model."""
        if self.model is not None:
            own = sentencepiece.processor(self.model)
            inside = encoder_of(spm.without_prefix(self.model))
            return MeasuredTokenizer(
                self.name, own.encode, inside, own.decode, spm.token_bytes_of(self.model), self.special
            )
        token_bytes = bytelevel.token_bytes_of(self.definition) if self.is_extensible else self._as_written()
        return MeasuredTokenizer(
            self.name, self.encode_fast, self.encode_fast, self.decode_fast, token_bytes, self.special
        )

    @property
    def is_extensible(self) -> bool:
        """Whether it can take new pieces: SentencePiece or byte-level BPE."""
        return self.model is not None or bytelevel.is_byte_level(self.definition)

    @property
    def special(self) -> frozenset[int]:
        """Ids of special tokens."""
        added = self.definition.get("added_tokens") or ()
        return frozenset(int(token["id"]) for token in added if token["special"])

    @property
    def definition(self) -> dict[str, Any]:
        """The content of tokenizer.json."""
        found: dict[str, Any] = json.loads(self.backend.to_str())
        return found

    def _as_written(self) -> list[bytes]:
        """Return the bytes of each id, for kinds that cannot be extended: in SentencePiece's spelling, or ChatGLM's."""
        written = getattr(self.tokenizer, "written", {})
        out = [b""] * self.backend.get_vocab_size()
        for piece, index in self.backend.get_vocab().items():
            byte = re.fullmatch("<0x([0-9A-F]{2})>", piece)
            text = written.get(piece, piece.replace(spm.BLANK, " "))
            out[index] = bytes.fromhex(byte[1]) if byte else text.encode()
        return out

    def encode_fast(self, texts: Sequence[str]) -> list[list[int]]:
        encoded = self.backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encoded]

    def decode_fast(self, ids: list[int]) -> str:
        return str(self.backend.decode(ids, skip_special_tokens=False))


@dataclass(frozen=True)
class ExtendedTokenizer:
    """A tokenizer with new tokens.

    files: the extended tokenizer; parts: for each new id, the old ids of the same text; seen: how often each learned
    piece occurred in the corpus when it was chosen.
    """

    files: TokenizerFiles
    first_new: int
    parts: list[list[int]]
    seen: list[int] = field(default_factory=list)

    @property
    def new_ids(self) -> range:
        return range(self.first_new, self.first_new + len(self.parts))


def open_tokenizer_files(name: str, *, to_measure: bool = False) -> TokenizerFiles:
    """Open a model's tokenizer (folder, hub id, modelscope:, .gguf) or a tokenizer file (tokenizer.json, a
    SentencePiece .model, a tiktoken file, tekken.json).

    to_measure: also accept a tokenizer that cannot be extended. Raises ModelError if it is none of these.
    """
    files = _open(Path(name), name)
    if not files.is_extensible and not to_measure:
        raise ModelError(
            _("a {type} tokenizer without tokenizer.model: neither byte-level BPE nor SentencePiece").format(
                type=files.definition["model"]["type"]
            ),
            place=files.name,
            remedy=_("put the model family's tokenizer.model next to it"),
        )
    return files


def _open(path: Path, name: str) -> TokenizerFiles:
    if path.is_file() and path.suffix != ".gguf":
        return _open_file(path)
    alone = path.is_dir() and (path / "tokenizer.json").is_file() and not (path / "config.json").is_file()
    place = load.ModelRef(name, name) if alone else load.locate(name)
    tokenizer = load.load_tokenizer(place)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ModelError(
            _("this tokenizer has no fast form (tokenizer.json)"),
            place=name,
        )
    file = Path(place.folder) / "tokenizer.model"
    model = sentencepiece.read_model(file) if file.is_file() and read_ranks(file) is None else None
    return TokenizerFiles(name, backend, model, tokenizer)


def _open_file(path: Path) -> TokenizerFiles:
    if path.suffix == ".json":
        definition = read_json(path)
        if "model" in definition:
            limits.check_tokenizer(path)
            return TokenizerFiles(str(path), open_definition(definition, str(path)))
    ranked = read_ranks(path)
    if ranked is not None:
        return TokenizerFiles(str(path), ranked)
    model = sentencepiece.read_model(path)
    return TokenizerFiles(str(path), sentencepiece.fast_form(model), model)


@dataclass(frozen=True)
class LearnedPieces:
    """Pieces learned from a corpus, most useful first, so that the first N can be taken for any N.

    found: merges for byte-level BPE, (piece, tokens saved) for SentencePiece.
    """

    base: TokenizerFiles
    script: Script
    found: Any

    def __len__(self) -> int:
        return len(self.found.pieces if self.base.model is None else self.found)

    def warn_if_fewer(self, pieces: int) -> None:
        if len(self) < pieces:
            console.notice(
                _(
                    "the corpus yields only {count:,} pieces, not {pieces:,}: no other pair in this script occurs twice"
                ).format(count=len(self), pieces=pieces)
            )

    def extended(self, pieces: int, words: Sequence[str] = (), special_tokens: Sequence[str] = ()) -> ExtendedTokenizer:
        """Return the base with the first learned pieces, then whole words, then special tokens.

        Raises RecipeError if a word is already a token or empty, or if the base's tokenizer would split it.
        """
        _check_new(self.base, [*words, *special_tokens])
        if self.base.model is None:
            return _extend_byte_level(self.base, self.found.first(pieces), words, special_tokens)
        return _extend_sentencepiece(self.base, self.found[:pieces], self.script, words, special_tokens)


def learn(
    base: TokenizerFiles,
    texts: Iterable[str],
    script: Script,
    most: int,
    on_progress: Callable[[int], None] = lambda done: None,
) -> LearnedPieces:
    """Learn at most `most` pieces. Raises DataError if the texts contain nothing in the script, ModelError if the base
    is not BPE."""
    if base.model is not None:
        spm.check_base(base.model, base.name)
        inside = encoder_of(spm.without_prefix(base.model))
        learned: LearnedMerges | list[tuple[str, int]] = (
            spm.learn_pieces(base.model, texts, script, inside, most, on_progress) if most else []
        )
    else:
        definition = base.definition
        token_bytes = bytelevel.token_bytes_of(definition)
        counted = bytelevel.count_words(base.backend, texts, script) if most else {}
        special = [token["content"].encode() for token in definition.get("added_tokens") or ()]
        learned = learn_merges(
            counted,
            token_bytes,
            script.allows,
            most,
            first_new=len(token_bytes),
            forbidden=special,
            progress=on_progress,
        )
    pieces = LearnedPieces(base, script, learned)
    if most and not len(pieces):
        raise DataError(
            _("no new piece can be learned: this tokenizer has every piece that the texts repeat"),
            place=base.name,
            remedy=_("use more text, or leave `vocab` out of the recipe"),
        )
    return pieces


def extended_by(base: TokenizerFiles, name: str) -> ExtendedTokenizer:
    """Open an extension of the base that was made elsewhere. Raises ModelError if it does not extend this base."""
    other = open_tokenizer_files(name)
    if base.model is None or other.model is None:
        raise ModelError(
            _("both must be SentencePiece models (tokenizer.model)"),
            place=f"vocab.tokenizer: {name}",
            remedy="vocab: {pieces: 2000}",
        )
    held = len(base.model.pieces)
    differing = next(
        (
            index
            for index, piece in enumerate(base.model.pieces)
            if index >= len(other.model.pieces) or other.model.pieces[index].piece != piece.piece
        ),
        None,
    )
    if differing is not None or len(other.model.pieces) == held:
        raise ModelError(
            (
                _("it is not an extension of {base}: ").format(base=base.name)
                + (
                    _("it has no more pieces")
                    if differing is None
                    else _("the pieces differ from id {differing} on").format(differing=differing)
                )
            ),
            place=f"vocab.tokenizer: {name}",
            remedy="tongwen tokenizer merge --base BASE/tokenizer.model --add CHINESE.model --out DIR",
        )
    inside = encoder_of(spm.without_prefix(base.model))
    new = [piece.piece.replace(spm.BLANK, " ") for piece in other.model.pieces[held:]]
    return ExtendedTokenizer(replace(other, tokenizer=base.tokenizer), held, inside(new))


def _extend_byte_level(
    base: TokenizerFiles, learned: LearnedMerges, words: Sequence[str], special_tokens: Sequence[str]
) -> ExtendedTokenizer:
    seen = bytelevel.counts_of(learned)
    definition = bytelevel.extend(base.definition, learned)
    if words:
        extended = Tokenizer.from_str(json.dumps(definition))
        learned = bytelevel.with_words(learned, bytelevel.token_bytes_of(definition), words, extended)
        definition = bytelevel.extend(base.definition, learned)
    backend = Tokenizer.from_str(json.dumps(bytelevel.with_special(definition, special_tokens)))
    return ExtendedTokenizer(
        TokenizerFiles(base.name, backend, None, base.tokenizer),
        learned.first_new,
        [*bytelevel.parts_of(learned), *base.encode_fast(special_tokens)],
        seen,
    )


def _extend_sentencepiece(
    base: TokenizerFiles,
    found: list[tuple[str, int]],
    script: Script,
    words: Sequence[str],
    special_tokens: Sequence[str],
) -> ExtendedTokenizer:
    forms = list(bytelevel.forms_of(words))
    pieces = [piece for piece, _ in found]
    merged = (
        spm.merge(base.model, pieces, script, encoder_of, words=forms) if pieces or forms else spm.unchanged(base.model)
    )
    for text in special_tokens:
        merged.append_control(text)
    seen, inside = dict(found), encoder_of(spm.without_prefix(base.model))
    return ExtendedTokenizer(
        from_model(base, merged.model),
        len(base.model.pieces),
        inside([piece.replace(spm.BLANK, " ") for piece in merged.added]),
        [seen[piece] for piece in merged.added if piece in seen],
    )


def from_model(base: TokenizerFiles, model: Any) -> TokenizerFiles:
    """Return a SentencePiece model with the fast form made from it."""
    return TokenizerFiles(base.name, sentencepiece.fast_form(model), model, base.tokenizer)


def encoder_of(model: Any) -> spm.Encode:
    encode: spm.Encode = sentencepiece.processor(model).encode
    return encode


def _check_new(base: TokenizerFiles, texts: Sequence[str]) -> None:
    known = set(base.definition["model"]["vocab"]) | {
        token["content"] for token in base.definition.get("added_tokens") or ()
    }
    for text in texts:
        if not text.strip() or text in known or texts.count(text) > 1:
            raise RecipeError(
                _("{text!r} is already a token, or empty").format(text=text),
                place="vocab.words / vocab.special_tokens",
                remedy=_("leave it out"),
            )


def save(files: TokenizerFiles, folder: Path) -> None:
    """Write tokenizer.json, tokenizer_config.json, and tokenizer.model if there is one. Names of special tokens,
    maximum length and chat template are kept."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(tokenizer_object=files.backend, **_settings(files))
    own = files.tokenizer
    if own is not None and own.chat_template:
        tokenizer.chat_template = own.chat_template
    tokenizer.save_pretrained(str(folder))
    config = folder / "tokenizer_config.json"
    known = read_json(config)
    # All versions of transformers know this class; version 4 does not know the one that version 5 writes.
    write_json(config, {**known, "tokenizer_class": "PreTrainedTokenizerFast", "model_input_names": INPUTS})
    if files.model is not None:
        (folder / "tokenizer.model").write_bytes(files.model.SerializeToString())


def _settings(files: TokenizerFiles) -> dict[str, Any]:
    own = files.tokenizer
    if own is None:
        return sentencepiece.special_names(files.model) if files.model is not None else {}
    names = {name: str(text) for name, text in own.special_tokens_map.items() if isinstance(text, str)}
    return {
        **names,
        "model_max_length": own.model_max_length,
        "padding_side": own.padding_side,
        "clean_up_tokenization_spaces": False,
    }


def curve(
    learned_pieces: LearnedPieces, rest: list[str], shape: ModelSize, steps: Sequence[int] = CURVE
) -> tuple[CurvePoint, list[CurvePoint]]:
    """Measure the tokenizer with more and more pieces on texts that were not learned from."""
    points = []
    for step in _reached(steps, len(learned_pieces)):
        extended = learned_pieces.extended(step)
        seen = sum(count >= SEEN_ENOUGH for count in extended.seen)
        points.append((step, extended.files.coder, seen))
    return make_curve(learned_pieces.base.coder, shape, rest, points)


def _reached(steps: Sequence[int], most: int) -> list[int]:
    """Return the steps that the corpus has pieces for, and the number of its pieces if it has fewer."""
    return sorted({min(step, most) for step in steps} - {0})


def shape_of(name: str) -> ModelSize:
    """Return the size of the model, which decides a token's cost; a nominal size without a model."""
    if Path(name).is_file() and Path(name).suffix != ".gguf":
        return NOMINAL
    place = load.locate(name)
    if place.is_local and not (Path(place.folder) / "config.json").is_file() and not place.gguf:
        return NOMINAL
    config = load.load_config(place)
    body, width = load.count_body(config)
    return ModelSize(name, body, width)


def shipped_texts() -> list[str]:
    """Return the dialogues that come with the package: real text without a download."""
    with resources.as_file(resources.files("tongwen.commands") / "demo_data" / "dialogues.jsonl") as file:
        return list(iter_texts([str(file)], lambda text: None))


# -- texts ---------------------------------------------------------------------------------------------------------


def iter_texts(paths: Sequence[str], notify: Callable[[str], None] = console.notice) -> Iterator[str]:
    """Yield the unchanged texts of files in any known format; dialogues turn by turn. Unreadable rows are counted and
    reported through `notify`."""
    section = Prepare(documents=[SourceConfig(path=path) for path in paths], clean=NO_CLEANING)
    for input_part in list_parts(section, local_copy, notify):
        part = replace(input_part, kind=kind_of(input_part.file, input_part.source))
        refused, first = 0, ""
        for raw, record in iter_rows(part, section, Cleaner(section.clean, part.kind), notify):
            if isinstance(record, (Document, Dialogue)):
                yield from texts_of(record)
            elif isinstance(record, RowRejected):
                refused, first = refused + 1, first or f"{raw.file}:{raw.row}: {record.rule}"
        if refused:
            notify(_("{refused:,} rows cannot be read, the first: {first}").format(refused=refused, first=first))


def texts_of(record: Record) -> Iterator[str]:
    if isinstance(record, Document):
        yield record.text
        return
    messages = (*record.prompt, *record.chosen) if isinstance(record, Preference) else record.messages
    yield from (message.content for message in messages if message.content)


def split(texts: Iterable[str]) -> tuple[Iterator[str], list[str]]:
    """Return (texts to learn from, every tenth text up to SAMPLE_CHARACTERS). The list fills during reading."""
    rest: list[str] = []
    return _without_tenth(texts, rest), rest


def _without_tenth(texts: Iterable[str], rest: list[str]) -> Iterator[str]:
    size = 0
    for index, text in enumerate(texts):
        if index % 10 == 0 and size < SAMPLE_CHARACTERS:
            rest.append(text)
            size += len(text)
        else:
            yield text


def sample_texts(texts: Iterable[str]) -> list[str]:
    """Return about SAMPLE_CHARACTERS of texts, spread evenly over all; at least one text."""
    return _evenly(list(texts))


def _evenly(texts: list[str]) -> list[str]:
    total = sum(map(len, texts))
    step = max(1, -(-total // SAMPLE_CHARACTERS))
    return texts[::step]
