"""A model's config as transformers reads it, the class that opens it, and the model without weights."""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from typing import Any

from tongwen.core.errors import ModelError
from tongwen.core.i18n import _
from tongwen.model.loading import limits
from tongwen.model.loading.loader_errors import explain_errors
from tongwen.model.loading.locate import cached_folder
from tongwen.model.loading.model_ref import ModelRef, gguf_option
from tongwen.model.loading.quiet import quiet


def register_family(ref: ModelRef) -> None:
    """Register ChatGLM-6B, which transformers lacks, if the folder's config names it. The config of a hub model that is
    not cached is unknown, so register it then too (this takes a second)."""
    folder = Path(ref.folder) if ref.is_local else cached_folder(ref.folder)
    files = [folder / name for name in ("config.json", "tokenizer_config.json")] if folder else []
    if folder is None or any(b"chatglm" in file.read_bytes().lower() for file in files if file.is_file()):
        importlib.import_module("tongwen.model.chatglm")


def load_config(ref: ModelRef) -> Any:
    from transformers import AutoConfig

    register_family(ref)
    if ref.is_local and not ref.gguf:
        limits.check_config(Path(ref.folder))
        limits.check_options(Path(ref.folder))
    with quiet(), explain_errors(ref):
        config = AutoConfig.from_pretrained(ref.folder, trust_remote_code=False, **gguf_option(ref))
    _check_quantization(config, ref)
    return config


def _check_quantization(config: Any, ref: ModelRef) -> None:
    """Raise ModelError for a method that transformers does not know: it would read the weights as they are."""
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

    stored = getattr(config, "quantization_config", None)
    method = stored.get("quant_method") if isinstance(stored, dict) else None
    known = (name.removesuffix("_4bit").removesuffix("_8bit") for name in AUTO_QUANTIZATION_CONFIG_MAPPING)
    if method is not None and str(method) not in known:
        raise ModelError(
            _("transformers cannot read weights quantised by {method!r}").format(method=method),
            place=ref.name,
            remedy=_("use the original, unquantised model: an adapter fits both"),
        )


def find_head(model: Any) -> Any:
    """Let a model that wraps a whole language model name that one's head as its own, which transformers' Nemotron-H Omni
    does not."""
    if model.get_output_embeddings() is None:
        inner = (part for part in model.modules() if part is not model and hasattr(part, "get_output_embeddings"))
        finders = (part.get_output_embeddings for part in inner)
        model.get_output_embeddings = next((find for find in finders if find() is not None), lambda: None)
    return model


def build_on_meta(config: Any) -> Any:
    """Build the model of a config on the meta device: shapes only, no memory for weights."""
    import torch

    with quiet(), torch.device("meta"):
        return find_head(auto_class(config).from_config(config, trust_remote_code=False))


def auto_class(config: Any) -> Any:
    """Return transformers' auto class for a config: the causal language model, or the whole model in which a language
    model is wrapped with vision or audio encoders.

    Some wrapped checkpoints could also be opened as their text part alone. But then a full fine-tuning would lose the
    towers, and an adapter would name layers differently from the files.
    """
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMultimodalLM
    from transformers.models.auto import modeling_auto as auto

    causal = auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type)
    saved_from = (config.architectures or [causal])[0]
    for wrapped, names in (
        (AutoModelForImageTextToText, auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES),
        (AutoModelForMultimodalLM, auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES),
    ):
        name = names.get(config.model_type)
        if name and name != causal and (causal is None or saved_from == name):
            return wrapped
    if type(config) not in AutoModelForCausalLM._model_mapping:
        raise ModelError(
            _("transformers has no language model of the type {model_type!r}").format(model_type=config.model_type),
            place=str(config.name_or_path),
            remedy=_("use a model for text generation, such as Qwen/Qwen3-0.6B"),
        )
    return AutoModelForCausalLM


def count_body(config: Any) -> tuple[int, int]:
    """Return (number of parameters without embedding and head, hidden size)."""
    model = build_on_meta(config)
    matrices = {id(part.weight) for part in (model.get_input_embeddings(), model.get_output_embeddings()) if part}
    body = sum(tensor.numel() for tensor in model.parameters() if id(tensor) not in matrices)
    return body, int(model.get_input_embeddings().weight.shape[1])
