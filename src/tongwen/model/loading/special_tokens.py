"""Correct wrong special tokens of published models in memory, with a notice; the user's files are not changed.

The first LLaMA conversions on the hub set bos to 0, eos to 1 and pad to -1, and their tokenizer has empty names for all
three. transformers then recurses without end, or trains on wrong tokens and the model never stops (F-11, F-12, F-15).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tongwen.core import console
from tongwen.core.artifact import read_json
from tongwen.core.i18n import _

USUAL = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": None}
IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def replace_empty_names(folder: Path) -> dict[str, str | None]:
    """Return replacements for special tokens with an empty name: the usual token if the vocabulary has it, or None."""
    empty = [name for name in USUAL if any(_text(held.get(name)) == "" for held in _configs(folder))]
    if not empty:
        return {}
    known = _pieces(folder)
    found = {name: text if (text := USUAL[name]) in known else None for name in empty}
    console.notice(
        _("{folder}: {empty} are empty; using {found} instead").format(
            folder=folder, empty=_(", ").join(empty), found=_(", ").join(str(text) for text in found.values())
        )
    )
    return found


def drop_invalid_ids(config: Any, rows: int, place: str) -> bool:
    """Remove special token ids for which the embedding has no row. Returns whether there were any.

    Such a padding id would freeze the last row, or make loading fail. place: the file, for the notice.
    """
    wrong = [name for name in IDS if isinstance(index := getattr(config, name, None), int) and not 0 <= index < rows]
    for name in wrong:
        console.notice(
            _("{place} has {name} {value}, but the vocabulary has {rows} tokens; it is ignored").format(
                place=place, name=name, value=getattr(config, name), rows=rows
            )
        )
        setattr(config, name, None)
    return bool(wrong)


def fix_stop_tokens(tokenizer: Any, model: Any, place: str) -> None:
    """Set the model's stop token to the tokenizer's eos if it would stop at bos or at the unknown token."""
    config = model.generation_config
    drop_invalid_ids(config, model.get_input_embeddings().weight.shape[0], f"{place}/generation_config.json")
    known = getattr(config, "eos_token_id", None)
    ends = list(known) if isinstance(known, (list, tuple)) else [known]
    never = {tokenizer.bos_token_id, tokenizer.unk_token_id} - {tokenizer.eos_token_id, None}
    wrong = [index for index in ends if index in never]
    if not wrong or tokenizer.eos_token_id is None:
        return
    console.notice(
        _(
            "{place}: an answer would end with token {wrong} ({token}); using the tokenizer's own end token: {eos_token_id} ({eos_token})"
        ).format(
            place=place,
            wrong=wrong[0],
            token=tokenizer.convert_ids_to_tokens(wrong[0]),
            eos_token_id=tokenizer.eos_token_id,
            eos_token=tokenizer.eos_token,
        )
    )
    right = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    for held in (config, model.config):
        for name, index in right.items():
            setattr(held, name, index)


def _configs(folder: Path) -> list[dict[str, Any]]:
    files = (folder / "tokenizer_config.json", folder / "special_tokens_map.json")
    return [read_json(file) for file in files if file.is_file()]


def _text(token: Any) -> Any:
    return token.get("content") if isinstance(token, dict) else token


def _pieces(folder: Path) -> set[str]:
    """Return the pieces of a tokenizer's vocabulary, read from its file."""
    if (file := folder / "tokenizer.json").is_file():
        from tokenizers import Tokenizer

        return set(Tokenizer.from_file(str(file)).get_vocab())
    if (file := folder / "tokenizer.model").is_file():
        from tongwen.model.loading.sentencepiece import read_model

        return {piece.piece for piece in read_model(file).pieces}
    return set()
