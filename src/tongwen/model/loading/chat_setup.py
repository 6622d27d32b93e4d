"""Chat setup of a model: its template bound to its tokenizer, and the tokens that end an answer."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from tongwen.core.answer_form import find_answer_form
from tongwen.core.chat_template import Template
from tongwen.core.errors import ArtifactError, ModelError
from tongwen.core.i18n import _
from tongwen.core.model_families import ENDS_OF_TEXT
from tongwen.core.records import Message

TOKENIZER = (
    "tokenizer*",
    "ice_text.model",
    "chat_template.jinja",
    "additional_chat_templates/*.jinja",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
)


def has_tokenizer(folder: Path) -> bool:
    return next(folder.glob("tokenizer*"), None) is not None


def copy_chat_setup(source: Path, out: Path) -> None:
    """Copy tokenizer, template and stop tokens of a model folder, byte for byte."""
    for pattern in (*TOKENIZER, "generation_config.json"):
        for file in source.glob(pattern):
            if file.is_file():
                copy = out / file.relative_to(source)
                copy.parent.mkdir(exist_ok=True)
                shutil.copyfile(file, copy)


def bind_template(name: str, tokenizer: Any, prefix: list[int]) -> Template:
    """Return the template of that name for this tokenizer. prefix: ids that the tokenizer puts before a text."""
    tokens = {key: str(value) for key, value in tokenizer.special_tokens_map.items() if isinstance(value, str)}
    own = tokenizer.chat_template
    return Template.make(name, own, tokens, special_texts(tokenizer), prefix=tokenizer.decode(prefix) if prefix else "")


def special_texts(tokenizer: Any) -> list[str]:
    """Texts of all control tokens."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    texts = {str(token.content) for token in added.values() if token.special} | set(tokenizer.all_special_tokens)
    return sorted(texts)


def stop_ids(tokenizer: Any, template: Template | None, generation_config: Any) -> tuple[int, ...]:
    """Return the ids that end an answer: the template's stop first, that of a call, then the model's own stop tokens."""
    ids: list[int] = []
    if template is not None:
        ids.append(int(tokenizer.convert_tokens_to_ids(template.stop)))
        calls = find_answer_form(template.for_calls).tools
        if not isinstance(calls, str) and calls.stop in set(template.special) - {template.stop}:
            ids.append(int(tokenizer.convert_tokens_to_ids(calls.stop)))
    known = getattr(generation_config, "eos_token_id", None)
    for index in [*(known if isinstance(known, (list, tuple)) else [known]), tokenizer.eos_token_id]:
        if index is not None and index not in ids:
            ids.append(int(index))
    return tuple(ids)


def end_of_text(tokenizer: Any) -> int:
    """Return the id that ends a document: the family's end-of-text token if the tokenizer has one, else its
    end-of-sequence token. Raises ModelError when there is neither."""
    special = special_texts(tokenizer)
    for text in ENDS_OF_TEXT:
        if text in special:
            return int(tokenizer.convert_tokens_to_ids(text))
    if tokenizer.eos_token_id is None:
        raise ModelError(
            _("this tokenizer has no end-of-text token"),
            place=type(tokenizer).__name__,
            remedy="tokenizer_config.json: eos_token",
        )
    return int(tokenizer.eos_token_id)


def control_ids(tokenizer: Any, template: Template) -> list[int]:
    """Return the ids of the control tokens that the template writes."""
    text = template.prompt([Message("user", "A")]) + template.stop
    return sorted({int(tokenizer.convert_tokens_to_ids(token)) for token in template.special if token in text})


def save_tokenizer(tokenizer: Any, template: Template | None, folder: Path) -> None:
    """Save the tokenizer with the training template, byte for byte; without one, with the tokenizer's own template."""
    if template is None:
        tokenizer.save_pretrained(str(folder))
        return
    tokenizer.chat_template = template.own_sources
    tokenizer.save_pretrained(str(folder))
    saved = folder / "chat_template.jinja"
    if saved.is_file() and saved.read_bytes() != template.source.encode():
        raise ArtifactError(_("the saved template differs from the one used in training"), place=str(saved))


def save_generation_config(model: Any, stops: tuple[int, ...], folder: Path) -> None:
    """Write a generation_config.json whose stop tokens are those that the model was trained with."""
    from transformers import GenerationConfig

    config = GenerationConfig.from_dict(model.generation_config.to_dict())
    config.eos_token_id = list(stops) if len(stops) > 1 else stops[0]
    if config.pad_token_id is None:
        config.pad_token_id = stops[0]
    config.save_pretrained(str(folder))


def context_length(config: Any) -> int:
    return int(getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None) or 2048)
