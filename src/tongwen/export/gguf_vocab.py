"""Convert a tokenizer to llama.cpp's form, from `tokenizer.json` alone.

llama.cpp implements two kinds: byte-level BPE, which first splits text by one of a few named patterns, and
SentencePiece's BPE, which merges by scores. The pattern is recognised from the tokenizer's definition, so an extended
vocabulary keeps its base's pattern. A pattern without a name in llama.cpp raises an error: it would give other ids.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tongwen.core import console
from tongwen.core.artifact import read_json
from tongwen.core.errors import ModelError
from tongwen.core.i18n import _
from tongwen.core.model_families import PATTERNS
from tongwen.core.rowless_tokens import read_rowless
from tongwen.core.tokenizer_json import open_definition

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # llama.cpp's token types
PHI3_KEEPS = {"<unk>", "<s>", "<|endoftext|>"}
MERGES_IGNORED = ("llama-bpe", "tekken")  # where llama.cpp takes a whole word that has a token before any merge
ENDS = ("eos", "eot", "eom")  # llama.cpp's names of tokens that end an answer; a name for each


@dataclass
class Vocabulary:
    """kind: gpt2 (byte-level) or llama (SentencePiece); pre: llama.cpp's name of the pattern; lists are by id."""

    kind: str
    pre: str
    tokens: list[str]
    types: list[int]
    merges: list[str] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    special: dict[str, int] = field(default_factory=dict)  # bos, eos, eot, eom, unk, pad -> id
    add_bos: bool = False
    add_space: bool = False
    drops_blanks: bool = False  # after special tokens
    unsupported: list[str] = field(
        default_factory=list
    )  # other tokens that drop spaces, which llama.cpp does not support


def read_vocabulary(folder: Path, rows: int) -> Vocabulary:
    """Read a folder's tokenizer for a model whose embedding has `rows` rows; ids without a token are marked unused.

    Raises ModelError for a tokenizer that llama.cpp does not support.
    """
    definition = read_json(folder / "tokenizer.json")
    open_definition(definition, str(folder / "tokenizer.json"))
    model = definition["model"]
    if model.get("type") != "BPE":
        raise _unknown(f"model {model.get('type')}")
    tokens = {int(index): token for token, index in model["vocab"].items()}
    added = {int(token["id"]): token for token in definition.get("added_tokens", ())}
    spare, needed = read_rowless(folder, rows)
    highest = max([*tokens, *added])
    if needed:
        raise ModelError(
            _("the tokenizer has ids up to {highest}, but the embedding has only {rows} rows").format(
                highest=highest, rows=rows
            ),
            place=str(folder),
        )
    if spare:
        console.notice(_("the embedding has no row for {tokens}: left out").format(tokens=", ".join(spare[:5])))
        added = {index: token for index, token in added.items() if index < rows}
        definition["added_tokens"] = list(added.values())
    sentencepiece = bool(model.get("byte_fallback"))
    out = Vocabulary("llama" if sentencepiece else "gpt2", "default", [], [])
    for index in range(rows):
        text, kind = _token(index, tokens.get(index), added.get(index), model, sentencepiece)
        out.tokens.append(text)
        out.types.append(kind)
    merges = [merge.split(" ", 1) if isinstance(merge, str) else merge for merge in model["merges"]]
    if sentencepiece:
        out.scores, out.add_space = _scores(folder, out.tokens, merges), _adds_space(definition)
    else:
        out.pre, out.merges = _pattern(definition), [f"{left} {right}" for left, right in merges]
    out.drops_blanks, out.unsupported = _blank_dropping(added.values())
    out.special, out.add_bos = _special(folder, definition, {**{i: t["content"] for i, t in added.items()}, **tokens})
    return out


def _token(index: int, token: str | None, added: Any, model: Mapping[str, Any], sentencepiece: bool) -> tuple[str, int]:
    if added is not None:
        if added["content"] == model.get("unk_token") and sentencepiece:
            return added["content"], UNKNOWN
        if added["special"]:
            return added["content"], CONTROL
        # llama.cpp finds it in the text before spaces are replaced, and writes it out verbatim.
        return added["content"].replace("\u2581", " ") if sentencepiece else added["content"], USER_DEFINED
    if token is None:
        return f"[PAD{index}]", UNUSED
    if sentencepiece and len(token) == 6 and token.startswith("<0x"):
        return token, BYTE
    return token, UNKNOWN if sentencepiece and token == model.get("unk_token") else NORMAL


def _blank_dropping(added: Iterable[Mapping[str, Any]]) -> tuple[bool, list[str]]:
    """Return (whether the tokenizer drops spaces after special tokens as Phi-3's does, after all but three; if not, the
    tokens that drop spaces, which llama.cpp does not support)."""
    dropping = {token["content"]: bool(token["rstrip"]) for token in added if token["special"] or token["rstrip"]}
    kept = {token for token, drops in dropping.items() if not drops}
    if "</s>" in dropping and kept == PHI3_KEEPS:
        return True, []
    return False, sorted(dropping.keys() - kept)


def _pattern(definition: Mapping[str, Any]) -> str:
    """Return llama.cpp's name of a byte-level tokenizer's splitting pattern."""
    cut = definition.get("pre_tokenizer") or {}
    steps = cut["pretokenizers"] if cut.get("type") == "Sequence" else [cut]
    kinds = [step.get("type") for step in steps]
    found = None
    if not any(step.get("add_prefix_space") for step in steps):
        if kinds == ["ByteLevel"] and steps[0].get("use_regex", True):
            found = "gpt-2"
        elif kinds == ["Digits", "ByteLevel"] and steps[0].get("individual_digits") and steps[1].get("use_regex", True):
            found = "smollm"
        elif {*kinds[:-1]} == {"Split"} and kinds[-1] == "ByteLevel" and not steps[-1].get("use_regex", True):
            found = NAMES.get(_spelled(step.get("pattern", {}).get("Regex", "") for step in steps[:-1]))
    if found is None or (found not in MERGES_IGNORED and definition["model"].get("ignore_merges")):
        raise _unknown(json.dumps(cut, ensure_ascii=False)[:160])
    return found


def _spelled(patterns: Iterable[str]) -> tuple[str, ...]:
    """Return patterns with line ends as escapes, which some files contain as characters."""
    return tuple(pattern.replace("\r", r"\r").replace("\n", r"\n") for pattern in patterns)


NAMES = {_spelled(patterns): name for name, patterns in PATTERNS.items()}


def _adds_space(definition: Mapping[str, Any]) -> bool:
    """Whether the tokenizer puts a space before every text."""
    text = json.dumps([definition.get("normalizer"), definition.get("pre_tokenizer")])
    return '"Prepend"' in text or '"prepend_scheme": "first"' in text or '"prepend_scheme": "always"' in text


def _scores(folder: Path, tokens: list[str], merges: list[Any]) -> list[float]:
    """Return SentencePiece's scores: from tokenizer.model if its pieces match, else equivalent ones from the merges."""
    file = folder / "tokenizer.model"
    if file.is_file():
        try:
            from sentencepiece import SentencePieceProcessor
        except ImportError:
            return _ranks(tokens, merges)
        pieces = SentencePieceProcessor(model_file=str(file))
        count = pieces.get_piece_size()
        if count <= len(tokens) and [pieces.id_to_piece(index) for index in range(count)] == tokens[:count]:
            return [float(pieces.get_score(index)) for index in range(count)] + [-1000.0] * (len(tokens) - count)
    return _ranks(tokens, merges)


def _ranks(tokens: list[str], merges: list[Any]) -> list[float]:
    rank: dict[str, float] = {}
    for number, (left, right) in enumerate(merges):
        rank.setdefault(left + right, -float(number))
    return [rank.get(token, -float(len(merges))) for token in tokens]


def _special(folder: Path, definition: Mapping[str, Any], texts: Mapping[int, str]) -> tuple[dict[str, int], bool]:
    """Return (ids of bos, unk, pad and of the tokens that end an answer; whether the tokenizer puts bos before every text)."""
    ids = {text: index for index, text in texts.items()}
    config = _json(folder / "tokenizer_config.json")
    special = {}
    for name in ("bos", "eos", "unk", "pad"):
        token = config.get(f"{name}_token")
        text = token.get("content") if isinstance(token, dict) else token
        if text in ids:
            special[name] = ids[text]
    stops = _json(folder / "generation_config.json").get("eos_token_id")
    stops = stops if isinstance(stops, list) else [stops]
    for name, stop in zip(ENDS, dict.fromkeys(stop for stop in stops if isinstance(stop, int)), strict=False):
        special[name] = stop  # the stop tokens of training in the model's order, rather than the base's
    before = open_definition(definition, str(folder / "tokenizer.json")).encode("").ids
    return special, "bos" in special and before[:1] == [special["bos"]]


def _json(file: Path) -> dict[str, Any]:
    return read_json(file) if file.is_file() else {}


def _unknown(what: str) -> ModelError:
    return ModelError(
        _("llama.cpp has no code for this tokenizer: {what}").format(what=what),
        place="tokenizer.json",
        remedy=_("use --to hf, for vLLM or SGLang"),
    )
