"""Sampling options of the scripts of 2023, by project."""

from __future__ import annotations

from typing import Any

PRESETS: dict[str, dict[str, Any]] = {
    "belle": {"beams": 4, "min_new_tokens": 1, "max_new_tokens": 512},
    "chatglm": {"temperature": 0.95, "top_p": 0.7, "max_new_tokens": 2048},
    "chinese-llama-alpaca": {
        "temperature": 0.2,
        "top_k": 40,
        "top_p": 0.9,
        "repetition_penalty": 1.3,
        "max_new_tokens": 400,
    },
    "chinese-llm-chat": {"temperature": 0.95, "top_k": 50, "top_p": 0.7, "max_new_tokens": 512},
}
