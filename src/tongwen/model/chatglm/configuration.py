"""ChatGLM-6B's `config.json`, old and new. Other models of the same name raise an error that names them.

ChatGLM2, ChatGLM3 and GLM-4's first release also use the model type `chatglm` but are different models: causal, with
RMSNorm and shared key and value heads.
"""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig

from tongwen.core.errors import ModelError
from tongwen.core.i18n import _


class ChatGLMConfig(PreTrainedConfig):
    """The defaults are those of the first checkpoints: 150,528 tokens, 20,000 of them for images."""

    model_type = "chatglm"
    keys_to_ignore_at_inference = ("past_key_values",)
    attribute_map = {  # noqa: RUF012 (transformers' interface)
        "num_hidden_layers": "num_layers",
        "intermediate_size": "inner_hidden_size",
        "max_position_embeddings": "max_sequence_length",
    }

    vocab_size: int = 150528
    hidden_size: int = 4096
    inner_hidden_size: int = 16384
    num_layers: int = 28
    num_attention_heads: int = 32
    layernorm_epsilon: float = 1e-5
    max_sequence_length: int = 2048
    initializer_range: float = 0.02
    use_cache: bool = True
    bos_token_id: int = 150004  # <sop>
    eos_token_id: int | list[int] = 150005  # <eop>
    mask_token_id: int = 150000
    gmask_token_id: int = 150001
    pad_token_id: int = 3
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        if generation := _generation(kwargs):
            raise _refused(
                _("this is {generation}, not the same model as ChatGLM-6B").format(generation=generation),
                _("not supported; its successor has a native transformers format: zai-org/glm-4-9b-chat-hf"),
            )
        if kwargs.get("quantization_bit"):
            raise _refused(
                _("its weights are stored in {quantization_bit} bits").format(
                    quantization_bit=kwargs["quantization_bit"]
                ),
                _("use the fp16 model; adapter: {method: qlora} quantises it"),
            )
        if kwargs.get("pre_seq_len") or not kwargs.get("position_encoding_2d", True):
            odd = "pre_seq_len" if kwargs.get("pre_seq_len") else "position_encoding_2d"
            raise _refused(
                _("{key}: {kwargs} is not supported").format(key=odd, kwargs=kwargs[odd]),
                _("use the original base model as published"),
            )
        super().__post_init__(**kwargs)


def _generation(config: dict[str, Any]) -> str:
    """Return the name of the other generation that a config belongs to; "" for ChatGLM-6B."""
    if not {"multi_query_attention", "padded_vocab_size", "rmsnorm"} & config.keys():
        return ""
    if config.get("padded_vocab_size", 0) > 100_000:
        return "GLM-4-9B"
    return "ChatGLM2-6B / ChatGLM3-6B"


def _refused(rule: str, remedy: str) -> ModelError:
    return ModelError(rule, place="config.json: model_type: chatglm", remedy=remedy)
