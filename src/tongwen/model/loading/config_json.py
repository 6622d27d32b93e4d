"""What a model folder's config.json says, read without transformers: the type, and whether the model can be trained."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tongwen.core import artifact
from tongwen.core.errors import ModelError
from tongwen.core.i18n import _
from tongwen.model.loading.model_ref import ModelRef

# Endings of architectures with another head than that of a language model.
OTHER_TASKS = (
    "ForMaskedLM",
    "Classification",
    "ForQuestionAnswering",
    "ForMultipleChoice",
    "ForPreTraining",
    "Diffusion",
)
# Architectures that transformers opens as language models, but that need a picture beside each text, see the whole text at
# once, or write actions.
NOT_CAUSAL = {
    *("BlipForConditionalGeneration", "Blip2ForConditionalGeneration", "InstructBlipForConditionalGeneration"),
    *("InstructBlipVideoForConditionalGeneration", "IdeficsForVisionText2Text", "Kosmos2ForConditionalGeneration"),
    *("PaliGemmaForConditionalGeneration", "CpmAntForCausalLM", "PI0ForConditionalGeneration"),
}


def read_model_type(ref: ModelRef) -> str:
    """Return `model_type` from a folder's config.json, read without transformers; "" without a config."""
    file = Path(ref.folder) / "config.json"
    return str(artifact.read_json(file).get("model_type", "")) if file.is_file() else ""


def read_text_type(ref: ModelRef) -> str:
    """Return the `model_type` of a wrapped model's text part; of any other model, its own."""
    file = Path(ref.folder) / "config.json"
    config = artifact.read_json(file) if file.is_file() else {}
    return str((config.get("text_config") or {}).get("model_type") or config.get("model_type", ""))


def check_trainable(ref: ModelRef) -> None:
    """Raise ModelError when a folder's config.json says that the model does not predict the next token of a text.

    Read without transformers; a model that this does not know is tried when it is opened.
    """
    file = Path(ref.folder) / "config.json"
    config = artifact.read_json(file) if file.is_file() else {}
    architectures = config.get("architectures")
    architecture = str(architectures[0]) if isinstance(architectures, list) and architectures else ""
    other = architecture in NOT_CAUSAL or architecture.endswith(OTHER_TASKS)
    # A config that knows cross-attention can be an encoder's or a decoder's, and says which: BERT and its descendants.
    sees_all = "add_cross_attention" in config and config.get("is_decoder") is False
    if not config.get("is_encoder_decoder") and not other and not sees_all:
        return
    raise ModelError(
        _("{architecture} does not predict the next token of a text, so it cannot be trained here").format(
            architecture=architecture or config.get("model_type")
        ),
        place=str(file),
        remedy=_("use a model for text generation, such as Qwen/Qwen3-0.6B"),
    )


def check_unquantised(ref: ModelRef, config: Mapping[str, Any] | None = None) -> None:
    """Raise ModelError for a model whose tensors are not its weights, so that no adapter can be merged into them.

    config: its config.json, if it was read before.
    """
    file = Path(ref.folder) / "config.json"
    if config is None:
        config = artifact.read_json(file) if file.is_file() else {}
    if config.get("quantization_config"):
        raise ModelError(
            _("this model is quantised"),
            place=ref.name,
            remedy=_("use the original, unquantised model: an adapter fits both"),
        )
