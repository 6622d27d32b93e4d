"""A small ChatGLM-6B folder with its own kind of tokenizer."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from tests.conftest import CORPUS

# What THUDM's folder says beside the vocabulary's size; its code must never be looked for.
AUTO_MAP = {"AutoConfig": "configuration_chatglm.ChatGLMConfig", "AutoModel": "modeling_chatglm.ChatGLMModel"}
TOKENIZER = {
    "tokenizer_class": "ChatGLMTokenizer",
    "bos_token": "<sop>",
    "eos_token": "<eop>",
    "end_token": "</s>",
    "gmask_token": "[gMASK]",
    "auto_map": {"AutoTokenizer": ["tokenization_chatglm.ChatGLMTokenizer", None]},
}


@pytest.fixture(scope="session")
def small_ice(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SentencePiece model of the original's kind, with few pieces."""
    from sentencepiece import SentencePieceTrainer

    folder = tmp_path_factory.mktemp("ice")
    (folder / "text").write_text("\n".join(CORPUS), encoding="utf-8")
    SentencePieceTrainer.train(
        input=str(folder / "text"),
        model_prefix=str(folder / "ice_text"),
        vocab_size=550,
        hard_vocab_limit=False,
        byte_fallback=True,
        pad_id=3,
        control_symbols=["[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>"],
        user_defined_symbols=["<n>", "<|tab|>", *(f"<|blank_{count}|>" for count in range(2, 81))],
        minloglevel=2,
    )
    return folder / "ice_text.model"


def chatglm_folder(folder: Path, ice: Path, images: int = 0) -> Path:
    """A folder as the original has it, with a tiny model. images: tokens before the text's."""
    from sentencepiece import SentencePieceProcessor

    from tongwen.model.chatglm import ChatGLMConfig, ChatGLMForCausalLM

    torch.manual_seed(0)
    shape = {"hidden_size": 64, "inner_hidden_size": 128, "num_layers": 2, "num_attention_heads": 2}
    pieces = SentencePieceProcessor(model_file=str(ice))
    names = {"bos_token_id": "<sop>", "eos_token_id": "<eop>", "mask_token_id": "[MASK]", "gmask_token_id": "[gMASK]"}
    ids = {key: pieces.piece_to_id(name) + images for key, name in names.items()}
    size = pieces.get_piece_size() + 184 + images  # the original's embedding has rows that no token owns, too
    ChatGLMForCausalLM(ChatGLMConfig(vocab_size=size, **shape, **ids)).save_pretrained(str(folder))
    written = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(written | {"auto_map": AUTO_MAP}))
    (folder / "tokenizer_config.json").write_text(json.dumps(TOKENIZER | {"num_image_tokens": images}))
    shutil.copyfile(ice, folder / "ice_text.model")
    return folder
