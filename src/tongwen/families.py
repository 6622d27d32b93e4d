"""Plain facts per model family that cannot be read off the model itself. One row each; code that a family needs
lives in `model/families`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Family:
    """targets:    module names that the family's users train with LoRA (`targets: family`)
    packs:      documents can be kept apart in one row (rotary positions, attention through transformers' interface)
    why_not:    why it does not pack, in plain words
    """

    targets: tuple[str, ...]
    packs: bool = True
    why_not: str = ""


_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")

FAMILIES: dict[str, Family] = {
    "llama": Family(_ATTENTION),
    "mistral": Family(_ATTENTION),
    "qwen2": Family(_ATTENTION),
    "qwen3": Family(_ATTENTION),
    "gemma": Family(_ATTENTION),
    "gemma2": Family(_ATTENTION, packs=False, why_not="soft-capped attention scores"),
    "gemma3_text": Family(_ATTENTION),
    "phi3": Family(("qkv_proj", "o_proj")),
    "glm": Family(_ATTENTION),
    "glm4": Family(_ATTENTION),
    "smollm3": Family(_ATTENTION),
    "bloom": Family(("query_key_value",), packs=False, why_not="ALiBi adds a bias by absolute distance"),
    "gpt2": Family(("c_attn",), packs=False, why_not="absolute positions in a table of fixed length"),
    "gpt_neox": Family(("query_key_value",)),
}


def family_of(model_type: str) -> Family | None:
    return FAMILIES.get(model_type)


# How byte-level tokenizers cut a text before they merge, by llama.cpp's name (`tokenizer.ggml.pre`). The same words as in
# GPT-4's pattern; digits alone (Qwen) or up to three together (Llama-3).
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
PATTERNS = {"qwen2": _WORDS + r"\p{N}" + _REST, "llama-bpe": _WORDS + r"\p{N}{1,3}" + _REST}
