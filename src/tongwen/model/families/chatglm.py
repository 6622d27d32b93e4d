"""Old import path of ChatGLM-6B: `import tongwen.model.families.chatglm` makes transformers able to open it."""

from __future__ import annotations

from tongwen.model.chatglm import ChatGLMConfig, ChatGLMForCausalLM, ChatGLMModel, ChatGLMTokenizer

__all__ = ["ChatGLMConfig", "ChatGLMForCausalLM", "ChatGLMModel", "ChatGLMTokenizer"]
