"""The fast encoder gives the ids of the tokenizers library, or is not used."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Regex, Tokenizer, models, pre_tokenizers

from tests.conftest import byte_level_tokenizer, sentencepiece_tokenizer
from tongwen.core.records import Span
from tongwen.data import encoder as encoder_module
from tongwen.data.encoder import Encoder
from tongwen.data.tiktoken_encoder import Unproven, make_tiktoken_encoder

ALPHABET = "天气很好。，今天我们 \n\t  \u3000  abcXYZ the of '123 don't—“”（）é😀𠮷\u200d\x85한"
WORDS = ("你好，世界", "今天天气", "Hello", " world", "it's", "<|im_start|>", "<|im_end|>", "\n\n", "1234", "   ")


def texts(count: int) -> list[str]:
    rng = random.Random(3)
    return ["".join(rng.choices([*ALPHABET, *WORDS], k=rng.randrange(1, 60))) for _ in range(count)]


def test_ids_match_the_tokenizers_library(tmp_path: Path) -> None:
    tokenizer = byte_level_tokenizer(tmp_path)
    fast = make_tiktoken_encoder(tokenizer.backend_tokenizer)
    encoded = 0
    for text in texts(3000):
        ids = fast.encode(text)
        if ids is not None:
            encoded += 1
            assert ids.tolist() == tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids, text
    assert 300 < encoded < 3000, "rare characters are left to the library"


def test_custom_split_is_kept(tmp_path: Path) -> None:
    tokenizer = byte_level_tokenizer(tmp_path)
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    split = pre_tokenizers.Split(Regex(r"\p{N}|[^\s\p{N}]+|\s+"), "isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    fast = make_tiktoken_encoder(backend)
    for text in texts(1000):
        if (ids := fast.encode(text)) is not None:
            assert ids.tolist() == backend.encode(text, add_special_tokens=False).ids, text


SPACED = [
    "  12",
    " 1",
    "\n\n678\t9",
    "a1b2c3 第3章",
    " 12 34  5 ",
    "3 ³ ½",
    "1's",
    "it's 10 o'clock, $5,000.00!",
    "\n 5\n",
    "7",
]


@pytest.mark.parametrize("each", [True, False])
def test_digits_are_set_apart_before_words(tmp_path: Path, each: bool) -> None:
    """SmolLM2's pre-tokenizer: blanks before a digit are a word of their own."""
    backend = Tokenizer.from_str(byte_level_tokenizer(tmp_path).backend_tokenizer.to_str())
    words = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=each), words])
    fast = make_tiktoken_encoder(backend)
    rng, encoded = random.Random(5), 0
    mixed = ["".join(rng.choices("12 \n\tab'天。s³½", k=rng.randrange(1, 30))) for _ in range(2000)]
    for text in [*SPACED, *mixed, *texts(1000)]:
        if (ids := fast.encode(text)) is not None:
            encoded += 1
            assert ids.tolist() == backend.encode(text, add_special_tokens=False).ids, text
    assert encoded > 1000


def in_turn(*patterns: str) -> pre_tokenizers.PreTokenizer:
    """Return what splits by one pattern after the other."""
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns]
    return pre_tokenizers.Sequence([*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


@pytest.mark.parametrize(
    "patterns",
    [
        (  # DeepSeek-V3's
            r"\p{N}{1,3}",
            r"[一-龥぀-ゟ゠-ヿ]+",
            r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+""",
        ),
        (r"[ab1-]+", r"\p{L}", r"(?:a|\p{N}|。|-|\s{2})+"),
        (r"(?i:THE)|\p{L}",),  # most characters are in no word
    ],
)
def test_splits_in_turn_are_kept(patterns: tuple[str, ...], tmp_path: Path) -> None:
    backend = Tokenizer.from_str(byte_level_tokenizer(tmp_path).backend_tokenizer.to_str())
    backend.pre_tokenizer = in_turn(*patterns)
    fast, encoded = make_tiktoken_encoder(backend), 0
    rng = random.Random(6)
    mixed = ["".join(rng.choices("12ab-天气カ。 \n\tthe'\xad$", k=rng.randrange(1, 30))) for _ in range(3000)]
    for text in [*SPACED, *mixed, *texts(1000)]:
        if (ids := fast.encode(text)) is not None:
            encoded += 1
            assert ids.tolist() == backend.encode(text, add_special_tokens=False).ids, text
    assert encoded > 2500


def test_tokens_with_several_merges_and_words_that_are_looked_up(tmp_path: Path) -> None:
    """Llama-3's and gpt-oss's: every pair that makes a token is a merge; some tokens are found as whole words only."""
    backend = Tokenizer.from_str(byte_level_tokenizer(tmp_path).backend_tokenizer.to_str())
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    rng, vocabulary = random.Random(7), {letter: index for index, letter in enumerate(letters)}
    while len(vocabulary) < 330:  # of few letters, so that pairs overlap
        known = [token for token in vocabulary if {*token} <= {*"abc"}]
        vocabulary.setdefault("".join(rng.choices(known, k=2)), len(vocabulary))
    pairs = [
        (token[:cut], token[cut:])
        for token in vocabulary
        for cut in range(1, len(token))
        if token[:cut] in vocabulary and token[cut:] in vocabulary
    ]
    vocabulary["cacbaXab"] = len(vocabulary)  # no two of its pieces make it
    backend.model = models.BPE(vocab=vocabulary, merges=pairs, ignore_merges=True)
    made = [one + other for one, other in pairs]
    assert len({*made}) < len(made)
    fast = make_tiktoken_encoder(backend)
    some = ["".join(rng.choices("abc", k=rng.randrange(1, 60))) for _ in range(3000)]
    for text in [*some, "cacbaXab", "cacbaXabc", " cacbaXab"]:
        ids = fast.encode(text)
        assert ids is not None and ids.tolist() == backend.encode(text, add_special_tokens=False).ids, text
    assert fast.encode("cacbaXab").tolist() == [vocabulary["cacbaXab"]]


def test_library_that_encodes_gives_its_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(encoder_module, "FAST_FROM", 10)
    encoder = Encoder(sentencepiece_tokenizer(tmp_path))
    for _ in range(2):
        encoder.encode_texts(["今天天气很好"] * 20)
    assert capsys.readouterr().out.count("tiktoken would be faster, but the tokens are no byte-level BPE") == 1


def test_unsupported_tokenizer_uses_the_library(tmp_path: Path) -> None:
    with pytest.raises(Unproven, match="no byte-level BPE"):
        make_tiktoken_encoder(sentencepiece_tokenizer(tmp_path / "s").backend_tokenizer)
    whole = Tokenizer.from_str(byte_level_tokenizer(tmp_path / "b").backend_tokenizer.to_str())
    model = whole.model
    make_tiktoken_encoder(whole)
    for pre_tokenizer in (
        pre_tokenizers.ByteLevel(add_prefix_space=True),
        pre_tokenizers.Sequence([pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=True)]),
        pre_tokenizers.Sequence([pre_tokenizers.Punctuation(), pre_tokenizers.ByteLevel(add_prefix_space=False)]),
        in_turn(r"\p{L}+\p{N}", r"\s+"),  # what is set apart first is no class of characters
        in_turn(r"\p{N}", r"\b\p{L}+"),  # what looks at its neighbours cannot be restricted
    ):
        whole.pre_tokenizer = pre_tokenizer
        with pytest.raises(Unproven, match="splits texts in another way"):
            make_tiktoken_encoder(whole)
    whole.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: index for index, letter in enumerate(letters)}
    # `abc` is listed as ab + c, but b + c is merged first: the library never makes `abc`, tiktoken would.
    merges = [("b", "c"), ("a", "b"), ("ab", "c")]
    for one, other in merges:
        vocabulary[one + other] = len(vocabulary)
    whole.model = models.BPE(vocab=vocabulary, merges=merges)
    assert whole.encode("abc").tokens == ["a", "bc"]
    with pytest.raises(Unproven, match="not made by their merges"):
        make_tiktoken_encoder(whole)
    whole.model = models.BPE(vocab=vocabulary, merges=merges, ignore_merges=True)
    assert whole.encode("abc").tokens == ["abc"] and whole.encode("abcd").tokens == ["a", "bc", "d"]
    with pytest.raises(Unproven, match="not made by their merges"):
        make_tiktoken_encoder(whole)
    whole.model = model
    make_tiktoken_encoder(whole)


def test_fast_encoder_is_used_for_many_texts_with_equal_ids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = byte_level_tokenizer(tmp_path)
    samples = [[Span("问：", False), Span(text, True)] for text in texts(400)]
    slow = Encoder(tokenizer)
    monkeypatch.setattr(encoder_module, "FAST_FROM", 10**9)
    wanted = [[list(map(int, piece.ids)) for piece in pieces] for pieces in slow.encode(samples)]
    assert slow.fast is None
    monkeypatch.setattr(encoder_module, "FAST_FROM", 100)
    fast = Encoder(tokenizer)
    assert [[list(map(int, piece.ids)) for piece in pieces] for pieces in fast.encode(samples)] == wanted
    assert fast.fast is not None


@pytest.mark.parametrize(("threads", "parallel"), [("1", ""), ("3", ""), ("0", ""), ("3", "false")])
def test_number_of_threads_changes_nothing(
    threads: str, parallel: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAYON_NUM_THREADS", threads)
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", parallel)
    fast = make_tiktoken_encoder(byte_level_tokenizer(tmp_path).backend_tokenizer)
    some = texts(700)
    for text, ids in zip(some, fast.encode_all(some), strict=True):
        alone = fast.encode(text)
        assert (ids is None and alone is None) or (
            ids is not None and alone is not None and ids.tolist() == alone.tolist()
        )


def test_one_mismatch_disables_the_fast_encoder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = byte_level_tokenizer(tmp_path)
    monkeypatch.setattr(encoder_module, "FAST_FROM", 10)
    encoder = Encoder(tokenizer)
    wrong = make_tiktoken_encoder(tokenizer.backend_tokenizer)
    monkeypatch.setattr(wrong, "encode", lambda text: np.zeros(3, np.uint32))
    monkeypatch.setattr(encoder_module, "make_tiktoken_encoder", lambda backend: wrong)
    ids = encoder.encode_texts(["今天天气很好"] * 20)
    assert encoder.fast is None and list(ids[0]) == tokenizer.backend_tokenizer.encode("今天天气很好").ids
    assert "using the tokenizers library instead" in capsys.readouterr().out
