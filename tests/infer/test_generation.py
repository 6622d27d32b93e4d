"""StreamDecoder: streamed pieces are whole characters and join to the decoded text."""

from __future__ import annotations

import random
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import CORPUS, SHARED, byte_level_tokenizer, sentencepiece_tokenizer
from tongwen.infer.generation import StreamDecoder
from tongwen.model.loading.model_ref import ModelRef
from tongwen.model.loading.tokenizer import load_tokenizer

SMOLLM2 = Path.home() / ".cache" / "tongwen" / "SmolLM2-135M-Instruct"
PARTS = [
    *CORPUS[:4],
    "龘靐齉爩 𠮷野家 𪚥",
    "👍🏽👨‍👩‍👧‍👦🇨🇳 😀",
    "```python\ndef f(x):\n\treturn x  # 返回\n```\n",
    "  缩进\n\n\n三空行 ",
    "naïve café ñ",
    "$\\frac{1}{2}$ <|x|> &amp;",
    "１２３ＡＢＣ，。！？",
]


def answers(count: int, seed: int) -> list[str]:
    rng = random.Random(seed)
    return ["".join(rng.choice(PARTS)[rng.randrange(3) :] for _ in range(rng.randrange(1, 5))) for _ in range(count)]


def tokenizer_of(kind: str, folder: Path) -> Any:
    if kind == "bytes":
        return byte_level_tokenizer(folder)
    if kind == "sentencepiece":
        return sentencepiece_tokenizer(folder)
    if kind == "smollm2":
        folder = SMOLLM2
    elif (file := SHARED / "tokenizers" / kind).is_file():
        shutil.copyfile(file, folder / "tokenizer.model")
        (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
        (folder / "config.json").write_text('{"model_type": "llama"}')
    if not any(folder.glob("tokenizer*")):
        pytest.skip(f"{kind} is not here")
    return load_tokenizer(ModelRef(str(folder), str(folder)))


@pytest.mark.parametrize("kind", ["bytes", "sentencepiece", "smollm2", "llama.model", "chinese_sp.model"])
def test_streamed_text_matches_decoded_text(kind: str, tmp_path: Path) -> None:
    tokenizer = tokenizer_of(kind, tmp_path)
    rng = random.Random(1)
    for number, text in enumerate(answers(500, seed=0)):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        if number % 5 == 0:  # what a model may say: cut anywhere, or any tokens at all
            ids = ids[: rng.randrange(len(ids))] + [rng.randrange(len(tokenizer)) for _ in range(rng.randrange(8))]
        whole = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        stream = StreamDecoder(tokenizer)
        pieces = [stream.add(index) for index in ids]
        assert "".join([*pieces, stream.rest()]) == whole, (number, text)
        if "\ufffd" not in whole:
            assert not any("\ufffd" in piece for piece in pieces)
