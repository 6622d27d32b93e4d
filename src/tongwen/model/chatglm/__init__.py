"""ChatGLM-6B without remote code: importing this makes transformers' Auto classes open its folders.

The one import in this project that changes something elsewhere: also who does not use tongwen otherwise needs it, to open
what was trained here. The `auto_map` in such a folder, which names code to download, is passed by.
"""

from __future__ import annotations

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

from tongwen.model.chatglm.configuration import ChatGLMConfig
from tongwen.model.chatglm.modeling import ChatGLMForCausalLM, ChatGLMModel
from tongwen.model.chatglm.tokenizer import ChatGLMTokenizer

AutoConfig.register("chatglm", ChatGLMConfig, exist_ok=True)
AutoModel.register(ChatGLMConfig, ChatGLMModel, exist_ok=True)
AutoModelForCausalLM.register(ChatGLMConfig, ChatGLMForCausalLM, exist_ok=True)
AutoTokenizer.register(ChatGLMConfig, fast_tokenizer_class=ChatGLMTokenizer, exist_ok=True)

__all__ = ["ChatGLMConfig", "ChatGLMForCausalLM", "ChatGLMModel", "ChatGLMTokenizer"]
