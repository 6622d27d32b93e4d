"""ChatGLM-6B without remote code: importing this package lets transformers' Auto classes open its folders.

This is the only import in the project with a side effect. Programs that do not use tongwen need it to open a trained
model. The `auto_map` in such a folder, which names code to download, is ignored.
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
