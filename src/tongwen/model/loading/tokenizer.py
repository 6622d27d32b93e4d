"""Load a model's tokenizer, and check that the embedding has a row for each of its tokens, which transformers does not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tongwen.core import console
from tongwen.core.errors import DataError, ModelError
from tongwen.core.i18n import _
from tongwen.core.rowless_tokens import split_rowless
from tongwen.model.loading import limits
from tongwen.model.loading.adapter_folder import adapter_folder
from tongwen.model.loading.architecture import register_family
from tongwen.model.loading.loader_errors import explain_errors
from tongwen.model.loading.model_ref import ModelRef, gguf_option
from tongwen.model.loading.quiet import quiet


def load_tokenizer(ref: ModelRef) -> Any:
    """Return a model's tokenizer. Raises ModelError or MachineError."""
    from transformers import AutoTokenizer

    from tongwen.model.loading import sentencepiece, special_tokens, tiktoken

    register_family(ref)
    overrides = special_tokens.replace_empty_names(Path(ref.folder)) if ref.is_local else {}
    if ref.is_local:
        limits.check_tokenizer(Path(ref.folder) / "tokenizer.json")
    with quiet(), explain_errors(ref):
        tokenizer = AutoTokenizer.from_pretrained(ref.folder, trust_remote_code=False, **overrides, **gguf_option(ref))

    if ref.gguf:
        tiktoken.fix_gguf_pretokenizer(tokenizer, Path(ref.folder) / ref.gguf)
    file = _lone_sentencepiece(ref)
    if file is None:
        return tokenizer
    return tokenizer if tiktoken.read_ranks(file) else sentencepiece.with_sentencepiece_ids(tokenizer, file)


def tokenizer_ref(ref: ModelRef) -> ModelRef:
    """Return the place of the tokenizer used in training: the topmost adapter that has one, else the base."""
    folders = [str(adapter_folder(Path(folder))) for folder in reversed(ref.adapters)]
    folder = next((folder for folder in folders if (Path(folder) / "tokenizer_config.json").is_file()), "")
    return ModelRef(folder, folder) if folder else ref


def _lone_sentencepiece(ref: ModelRef) -> Path | None:
    """Return the model's tokenizer.model if there is no tokenizer.json beside it."""
    if ref.is_local:
        file = Path(ref.folder) / "tokenizer.model"
    elif ref.gguf:
        return None
    else:
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(ref.folder, "tokenizer.model")
        file = Path(found if isinstance(found, str) else "")
    return file if file.is_file() and not file.with_name("tokenizer.json").is_file() else None


def check_tokenizer(tokenizer: Any, model: Any, ref: ModelRef) -> list[str]:
    """Return the tokens that may not occur, since the embedding has no row for them, and say so. Raises ModelError when texts
    need such a token."""
    rows = model.get_input_embeddings().weight.shape[0]
    vocabulary = tokenizer.get_vocab()
    named = [str(token) for token in (tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token) if token]
    template = str(getattr(tokenizer, "chat_template", None) or "")
    spare, needed = split_rowless(
        vocabulary, getattr(tokenizer, "get_added_vocab", dict)().keys(), named, template, rows
    )
    if needed:
        raise ModelError(
            _("the tokenizer has ids up to {highest}, but the embedding has only {rows} rows").format(
                highest=max(vocabulary.values()), rows=rows
            ),
            place=ref.name,
            remedy=_("use this model's own tokenizer"),
        )
    if spare:
        console.notice(
            _("{place}: the embedding has no row for {tokens}: a text that contains one is refused").format(
                place=ref.name, tokens=", ".join(spare[:5])
            )
        )
    return spare


def check_ids_have_rows(ids: Any, tokenizer: Any, rows: int, place: str) -> None:
    """Raise DataError when one of these ids has no row in the embedding."""
    highest = int(max(ids, default=0)) if isinstance(ids, list) else int(ids.max(initial=0))
    if highest >= rows:
        raise DataError(
            _("a text contains {token}, for which the embedding has no row").format(
                token=tokenizer.convert_ids_to_tokens(highest)
            ),
            place=place,
            remedy=_("remove this token from the texts"),
        )
