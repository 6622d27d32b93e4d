"""Open a tokenizer of any kind by name, and save it as the files of its family.

Two kinds can be extended. SentencePiece (LLaMA, Mistral): `tokenizer.model` is authoritative, and the fast form is made
from it. Byte-level BPE (Llama-3, Qwen, SmolLM2): there is only tokenizer.json.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from tongwen.core.artifact import read_json, write_json
from tongwen.core.errors import ModelError
from tongwen.core.i18n import _
from tongwen.core.tokenizer_json import open_definition
from tongwen.model.loading import limits, sentencepiece
from tongwen.model.loading.locate import locate
from tongwen.model.loading.model_ref import ModelRef
from tongwen.model.loading.tiktoken import read_ranks
from tongwen.model.loading.tokenizer import load_tokenizer
from tongwen.vocab import bytelevel, spm
from tongwen.vocab.measure import MeasuredTokenizer

INPUTS = ["input_ids", "attention_mask"]


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
    place = ModelRef(name, name) if alone else locate(name)
    tokenizer = load_tokenizer(place)
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


def from_model(base: TokenizerFiles, model: Any) -> TokenizerFiles:
    """Return a SentencePiece model with the fast form made from it."""
    return TokenizerFiles(base.name, sentencepiece.fast_form(model), model, base.tokenizer)


def encoder_of(model: Any) -> spm.Encode:
    encode: spm.Encode = sentencepiece.processor(model).encode
    return encode


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
