"""Facts about model families that a model's own files do not contain, one row per family. Code that a family needs is in
`model/families`; docs/families.md is generated from these rows."""

from __future__ import annotations

from dataclasses import dataclass

from tongwen.core.i18n import N_


@dataclass(frozen=True)
class Family:
    """models:     names of models of the family, for documentation
    targets:    module names that the family's users train with LoRA (`targets: family`)
    padded:     why documents cannot share one packed row, so that batches are padded; None where they can (positions
                may restart, attention goes through transformers' interface)
    dialogues_only: why the family cannot learn from plain text; None where it can
    table:      positions are rows of a table: longer inputs are impossible
    transposed: the file stores matrices as (in, out), as GPT-2's Conv1D does
    experts:    adapters train fused experts, which the file stores one by one: merged in memory
    like_llama: layers compute the same as LLaMA's, so base + adapters and the merged model are compared layer by layer
    vllm:       whether vLLM lists the architecture (vLLM needs a GPU; the tests do not run it)
    """

    models: str
    targets: tuple[str, ...]
    padded: str | None = None
    dialogues_only: str | None = None
    table: bool = False
    transposed: bool = False
    experts: bool = False
    like_llama: bool = False
    vllm: bool = True


_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_LATENT = ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")

FAMILIES: dict[str, Family] = {
    "llama": Family(
        "LLaMA 1 / 2 / 3, Chinese-LLaMA-Alpaca, Yi, SmolLM2, Baichuan-7B (converted)",
        _ATTENTION,
        like_llama=True,
    ),
    "mistral": Family("Mistral", _ATTENTION, like_llama=True),
    "qwen2": Family("Qwen1.5, Qwen2, Qwen2.5", _ATTENTION, like_llama=True),
    "qwen3": Family("Qwen3", _ATTENTION, like_llama=True),
    "qwen3_moe": Family("Qwen3-30B-A3B, Qwen3-235B-A22B", _ATTENTION, experts=True),
    "deepseek_v2": Family("DeepSeek-V2", _LATENT, experts=True),
    "deepseek_v3": Family("DeepSeek-V3, R1", _LATENT, experts=True),
    "glm": Family("GLM-4-9B (hf)", _ATTENTION),
    "glm4": Family("GLM-4-0414", _ATTENTION),
    "chatglm": Family(
        "ChatGLM-6B",
        ("query_key_value",),
        dialogues_only=N_("it is a prefix language model: the learned text must follow <sop>"),
        vllm=False,
    ),
    "bloom": Family(
        "BLOOM, BLOOMZ, BELLE",
        ("query_key_value",),
        padded=N_("ALiBi adds a bias by absolute distance"),
    ),
    "gpt2": Family("GPT-2, Wenzhong", ("c_attn",), table=True, transposed=True),
    "gpt_neox": Family("GPT-NeoX, Pythia", ("query_key_value",)),
    "gemma": Family("Gemma", _ATTENTION),
    "gemma2": Family(
        "Gemma 2",
        _ATTENTION,
        padded=N_("soft-capped attention scores"),
    ),
    "gemma3_text": Family("Gemma 3 (text)", _ATTENTION),
    "phi3": Family("Phi-3, Phi-4", ("qkv_proj", "o_proj")),
    "smollm3": Family("SmolLM3", _ATTENTION),
}


def family_of(model_type: str) -> Family | None:
    return FAMILIES.get(model_type)


# End-of-document tokens of families that end an answer with another token.
ENDS_OF_TEXT = ("<|endoftext|>", "<|end_of_text|>", "<\uff5cend\u2581of\u2581sentence\uff5c>", "<eos>", "</s>")

# Pre-tokenizer patterns of byte-level tokenizers by llama.cpp's name (`tokenizer.ggml.pre`), applied one after the other.
# Words as in GPT-4's pattern; digits alone (Qwen) or up to three together (Llama-3). GPT-4o and its descendants
# (Phi-4-mini, gpt-oss) end a word where capitals begin again; DeepSeek-V3 splits off Chinese and kana first; Qwen3.5 keeps
# marks with their letters.
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER, _SHORT = (
    r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]",
    r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?|",
)
_BEFORE = r"[^\r\n\p{L}\p{N}]?"
_END = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
PATTERNS = {
    "qwen2": (_WORDS + r"\p{N}" + _REST,),
    "llama-bpe": (_WORDS + r"\p{N}{1,3}" + _REST,),
    "bloom": (r" ?[^(\s|[.,!?…。，、।۔،])]+",),
    "gpt-4o": (f"{_BEFORE}{_UPPER}*{_LOWER}+{_SHORT}{_BEFORE}{_UPPER}+{_LOWER}*{_SHORT}" + r"\p{N}{1,3}" + _END,),
    "tekken": (f"{_BEFORE}{_UPPER}*{_LOWER}+|{_BEFORE}{_UPPER}+{_LOWER}*|" + r"\p{N}" + _END,),
    "qwen35": (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    ),
    "seed-coder": (_WORDS + r"\p{N}{1}| ?[^\s\p{L}\p{N}\r\n]+|\s*[\r\n]+|\s+(?!\S)|\s+",),
    "minicpm5": (r"\p{N}{1,3}", _WORDS + r"\p{N}+" + _REST),
    "deepseek-v3": (
        r"\p{N}{1,3}",
        "[一-龥぀-ゟ゠-ヿ]+",
        r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|"""
        "[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+| ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+",
    ),
}
