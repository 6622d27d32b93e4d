"""The import path of ChatGLM-6B that users know: `import tongwen.model.families.chatglm` before transformers opens it."""

from __future__ import annotations

from tongwen.model.chatglm import ChatGLMConfig, ChatGLMForCausalLM, ChatGLMModel, ChatGLMTokenizer

__all__ = ["ChatGLMConfig", "ChatGLMForCausalLM", "ChatGLMModel", "ChatGLMTokenizer"]
