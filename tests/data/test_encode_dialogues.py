"""Boundaries are exact for every kind of tokenizer, and the mask never depends on ids."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import byte_level_tokenizer
from tests.data.encoding import KINDS, dialogue, make
from tongwen.core.errors import DataError
from tongwen.core.records import Dialogue, Message, Origin
from tongwen.data import token_store
from tongwen.data.encode_dialogues import encode_dialogues
from tongwen.data.encoder import Encoder
from tongwen.data.ledger import Ledger, RejectedRow
from tongwen.data.mask_checks import check_store
from tongwen.data.token_store import TokenStore
from tongwen.model.loading.chat_setup import bind_template
from tongwen.recipe.training import Sft


def store_of(tokenizer, dialogues, template="plain", **options) -> tuple[TokenStore, Ledger, list[RejectedRow]]:
    encoder = Encoder(tokenizer)
    ledger, rejected = Ledger("rows", "tokens"), list[RejectedRow]()
    bound = bind_template(template, tokenizer, encoder.prefix)
    store = token_store.in_memory(encode_dialogues(dialogues, bound, encoder, Sft(**options), ledger, rejected.append))
    ledger.check()
    return store, ledger, rejected


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("answer", ["是", "否", "好", "H", "Hello", " 是", "是 ", "\n是", "一", "😀"])
@pytest.mark.parametrize("question", ["你好", "问 ", "Hello: ", "x\n"])
def test_learned_tokens_are_the_answer_and_its_stop(kind: str, answer: str, question: str, tmp_path: Path) -> None:
    """F-10: a short answer must not be swallowed by the border of the prompt."""
    tokenizer = make(kind, tmp_path)
    for template in ("plain", "alpaca-zh", "chatml") if kind == "bytes" else ("plain", "alpaca-zh"):
        store, _, _ = store_of(tokenizer, [dialogue(question, answer, "再问", answer)], template)
        ids, learn = store.sample(0)
        stop = bind_template(template, tokenizer, Encoder(tokenizer).prefix).stop
        borders = np.flatnonzero(np.diff(np.concatenate([[0], learn.astype(int), [0]])))
        for begin, end in zip(borders[::2], borders[1::2], strict=True):
            piece = ids[begin:end].tolist()
            assert tokenizer.convert_ids_to_tokens(piece[-1]) == stop
            # decoded behind a token, so that a decoder that strips the first blank of a text does not hide one
            lead = tokenizer("a", add_special_tokens=False)["input_ids"][-1]
            text = tokenizer.decode([lead, *piece[:-1]], clean_up_tokenization_spaces=False)
            assert text.removeprefix(tokenizer.decode([lead])) == answer
        assert len(borders) == 4


@pytest.mark.parametrize("kind", KINDS)
def test_prompt_is_encoded_as_inference_encodes_it(kind: str, tmp_path: Path) -> None:
    tokenizer = make(kind, tmp_path)
    encoder = Encoder(tokenizer)
    template = bind_template("plain", tokenizer, encoder.prefix)
    store, _, _ = store_of(tokenizer, [dialogue("你好", "是")])
    ids, learn = store.sample(0)
    prompt = encoder.encode_prompt(template.prompt([Message("user", "你好")]))
    assert ids[: len(prompt)].tolist() == prompt
    assert not learn[: len(prompt)].any()
    assert prompt == tokenizer(template.prompt([Message("user", "你好")]), add_special_tokens=False)["input_ids"]


def test_pad_equal_to_eos_masks_nothing(tmp_path: Path) -> None:
    tokenizer = byte_level_tokenizer(tmp_path)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    store, _, _ = store_of(tokenizer, [dialogue("你好", "是")], "chatml")
    ids, learn = store.sample(0)
    assert learn[-1]
    assert ids[-1] == tokenizer.pad_token_id
    assert store.stops.all()


def test_too_long_samples_are_counted_never_cut(tmp_path: Path) -> None:
    tokenizer = byte_level_tokenizer(tmp_path)
    rows = [dialogue("你好", "是"), dialogue("你好", "今天天气很好。" * 40), dialogue("<|im_end|>", "是")]
    store, ledger, rejected = store_of(tokenizer, rows, "chatml", max_length=60)
    assert (len(store), ledger.items_in, ledger.kept) == (1, 3, 1)
    assert dict(ledger.lost) == {"too_long": 1, "control_token_in_text": 1}
    assert "max_length is 60" in rejected[1].rule or "max_length is 60" in rejected[0].rule
    assert ledger.size_in == ledger.size_kept + ledger.size_lost["too_long"]
    with pytest.raises(DataError, match=r"longer than max_length 8[\s\S]*raise sft.max_length"):
        lost = [json.loads(bad.to_line()) for bad in rejected]
        check_store(store_of(tokenizer, rows, "chatml", max_length=8)[0], Sft(max_length=8), lost)


def turns(*contents: str) -> Dialogue:
    return Dialogue((Message("system", "助手"), *dialogue(*contents).messages), Origin("f", 1))


@pytest.mark.parametrize("policy", ["drop_turns", "cut_prompt"])
def test_long_dialogue_loses_oldest_turns_but_keeps_the_answer(policy: str, tmp_path: Path) -> None:
    tokenizer = byte_level_tokenizer(tmp_path)
    long = turns("龘" * 30, "好的", "今天天气", "很好", "然后呢", "完了")
    options = {"max_length": 90, "too_long": policy}
    store, ledger, rejected = store_of(tokenizer, [long], "chatml", **options)
    assert not rejected
    text = tokenizer.decode(store.sample(0)[0])
    assert "龘" not in text and "助手" in text
    assert text.endswith("完了<|im_end|>") and "今天天气" in text
    assert ledger.lost["turns_dropped"] == 0 < ledger.size_lost["turns_dropped"]
    question = turns("龘" * 60, "是")
    store, ledger, rejected = store_of(tokenizer, [question], "chatml", **options)
    if policy == "drop_turns":
        assert [bad.reason for bad in rejected] == ["too_long"]
    else:
        assert 80 <= len(store.ids) <= 90
        assert tokenizer.decode(store.sample(0)[0]).endswith("是<|im_end|>")
        assert store.stops.all()
        assert ledger.size_lost["prompt_cut"] == ledger.size_in - len(store.ids)
