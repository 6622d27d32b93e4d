"""ChatGLM-6B's tokenizer: `ice_text.model` in the tokenizers library, id for id.

Line ends, tabs and runs of blanks have their own pieces, which replace them in the text before SentencePiece sees it.
NFKC turns full-width punctuation into half-width in the input; `fix_punctuation` reverses this in answers.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from tongwen.core.shipped_templates import shipped_source
from tongwen.model.loading.sentencepiece import BLANK, normalizer_of, read_model

IMAGE_TOKENS = 20000  # before the text's, in the first checkpoints
NEVER = -1000.0  # score of pieces that are in the vocabulary but must not be found in a text
WRITTEN = {"<n>": "\n", "<|tab|>": "\t", **{f"<|blank_{count}|>": " " * count for count in range(80, 1, -1)}}
SPECIAL = {
    "bos_token": "<sop>",
    "eos_token": "<eop>",
    "pad_token": "<pad>",
    "unk_token": "<unk>",
    "mask_token": "[MASK]",
}


FULL_WIDTH = str.maketrans(",!:;?", "，！：；？")


class ChatGLMTokenizer(PreTrainedTokenizerFast):
    """`[gMASK] <sop>` is appended to a text, where the answer begins; padding goes on the left."""

    vocab_files_names = {"vocab_file": "ice_text.model", "tokenizer_file": "tokenizer.json"}  # noqa: RUF012
    padding_side = "left"
    answers_start_with_space = True  # with a space of their own, as every text
    written = WRITTEN

    @classmethod
    def convert_to_native_format(cls, trust_remote_code: bool = False, **options: Any) -> dict[str, Any]:
        """transformers' hook before `__init__`: a folder may hold `tokenizer.json` or `ice_text.model`."""
        if not options.get("tokenizer_file"):
            images = options.get("num_image_tokens", IMAGE_TOKENS)
            options["tokenizer_object"] = make_backend(Path(options["vocab_file"]), images)
        return {"chat_template": shipped_source("chatglm"), **SPECIAL, **options}

    @staticmethod
    def fix_punctuation(text: str) -> str:
        """Return an answer with full-width punctuation next to Chinese characters. Its length does not change."""
        return re.sub(
            r"(?<=[\u4e00-\u9fff])[,!:;?]|[,!:;?](?=[\u4e00-\u9fff])",
            lambda found: found[0].translate(FULL_WIDTH),
            text,
        )


def make_backend(file: Path, image_tokens: int) -> Tokenizer:
    """Build the fast tokenizer for `ice_text.model`. image_tokens: number of ids before those of the text."""
    model = read_model(file)
    pieces = [(f"<image_{index}>", NEVER) for index in range(image_tokens)]
    pieces += [(piece.piece, NEVER if piece.type == piece.BYTE else piece.score) for piece in model.pieces]
    tokenizer = Tokenizer(models.Unigram(pieces, image_tokens + model.trainer_spec.unk_id, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence(
        [*(normalizers.Replace(text, piece) for piece, text in WRITTEN.items()), normalizer_of(model.normalizer_spec)]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("|".join(map(re.escape, WRITTEN))), "isolated")
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace(BLANK, " "),
            *(decoders.Replace(piece, text) for piece, text in WRITTEN.items()),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    control = [piece.piece for piece in model.pieces if piece.type in (piece.CONTROL, piece.UNKNOWN)]
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in control])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A [gMASK] <sop>",
        pair="$A [gMASK] <sop> $B <eop>",
        special_tokens=[(text, tokenizer.token_to_id(text)) for text in ("[gMASK]", "<sop>", "<eop>")],
    )
    return tokenizer
