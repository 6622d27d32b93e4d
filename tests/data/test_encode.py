"""Boundaries are exact for every kind of tokenizer, the prefix is added once, and the mask never depends on ids."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import byte_level_tokenizer, sentencepiece_tokenizer
from tongwen.core.errors import DataError
from tongwen.core.records import Dialogue, Document, Message, Origin, Span
from tongwen.data import token_store
from tongwen.data.encode import Encoder, check_store, encode_dialogues, encode_documents, token_bytes
from tongwen.data.ledger import Ledger, RejectedRow
from tongwen.data.token_store import SAMPLE, TokenStore, spans_of
from tongwen.model.loading.chat_setup import bind_template, end_of_text
from tongwen.recipe.training import Sft

KINDS = ("bytes", "sentencepiece", "legacy")


def make(kind: str, folder: Path):
    if kind == "bytes":
        return byte_level_tokenizer(folder)
    return sentencepiece_tokenizer(folder, legacy=kind == "legacy")


def dialogue(*contents: str) -> Dialogue:
    return Dialogue(
        tuple(Message("user" if index % 2 == 0 else "assistant", text) for index, text in enumerate(contents)),
        Origin("f", 1),
    )


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


@pytest.mark.parametrize("kind", KINDS)
def test_prefix_is_added_exactly_once(kind: str, tmp_path: Path) -> None:
    tokenizer = make(kind, tmp_path)
    encoder = Encoder(tokenizer)
    assert encoder.prefix == ([] if kind == "bytes" else [1])
    for text in ("你好", "<s>你好", "<s><s>你好") if encoder.prefix else ("你好",):
        ids = encoder.encode_prompt(text)
        assert ids[:1] == encoder.prefix[:1] or not encoder.prefix
        assert ids.count(1) == len(encoder.prefix) or not encoder.prefix


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


def test_dataset_without_learned_stops_is_refused() -> None:
    samples = np.zeros(2, SAMPLE)
    samples["stop"] = [True, False]
    learn = np.array([False, True, False, True])
    store = TokenStore(np.zeros(4, np.uint32), np.array([0, 2, 4]), spans_of(learn), samples, ("f",))
    with pytest.raises(DataError, match=r"50\.0%"):
        check_store(store, Sft(), [])
    assert check_store(store, Sft(min_stop_learned=0.5), [])["stop_learned_share"] == 0.5


@pytest.mark.parametrize("kind", KINDS)
def test_bytes_of_tokens_add_up_to_the_text(kind: str, tmp_path: Path) -> None:
    tokenizer = make(kind, tmp_path)
    sizes = token_bytes(tokenizer)
    text = "你好，世界 Hello 😀\n二"
    ids = Encoder(tokenizer).encode([[Span("问", False), Span(text, True)]])[0]
    learned = [index for piece in ids if piece.learn for index in piece.ids]
    assert sizes[learned].sum() == len(text.encode())
    assert not sizes[tokenizer.all_special_ids].any()


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


def test_disk_store_equals_memory_store_after_a_crash(tmp_path: Path) -> None:
    tokenizer = byte_level_tokenizer(tmp_path)
    encoder = Encoder(tokenizer)
    bound = bind_template("chatml", tokenizer, encoder.prefix)
    rows = [dialogue(f"问{index}", "今天天气很好。" * (1 + index % 9), "再问", "答") for index in range(2500)]
    rows[7], rows[2100] = dialogue("<|im_end|>", "坏"), dialogue("长", "龘" * 200)
    section = Sft(max_length=256)

    def encode(some, ledger, rejected):
        return encode_dialogues(some, bound, encoder, section, ledger, rejected.append)

    whole = Ledger("rows", "tokens")
    memory = token_store.in_memory(encode(rows, whole, bad := []))
    writer = token_store.Writer(tmp_path / "s", len(tokenizer))
    ledger, rejected = writer.ledger, []
    for number, batch in enumerate(encode(rows, ledger, rejected)):
        writer.add(batch, ledger, [one.to_line() for one in rejected])
        rejected.clear()
        if number == 1:  # the process dies in the middle of the next batch
            break
    (tmp_path / "s.partial" / "ids.bin").open("ab").write(b"half")
    (tmp_path / "s.partial" / "journal.jsonl").open("ab").write(b'{"rows": 99')
    assert token_store.open_store(tmp_path / "s") is None
    writer = token_store.Writer(tmp_path / "s", len(tokenizer))
    assert writer.rows == 2000
    ledger = writer.ledger
    for batch in encode(rows[writer.rows :], ledger, rejected):
        writer.add(batch, ledger, [one.to_line() for one in rejected])
    writer.close()
    disk, found = token_store.open_store(tmp_path / "s")
    assert found.to_dict() == whole.to_dict()
    assert disk.ids.dtype == np.uint16
    for name in ("ids", "offsets", "spans", "samples"):
        assert np.array_equal(getattr(disk, name), getattr(memory, name)), name
    assert (disk.files, disk.roles) == (memory.files, memory.roles)
    assert [row["reason"] for row in token_store.read_rejected(tmp_path / "s")] == [one.reason for one in bad]
    assert len(bad) == 2
    (tmp_path / "s" / "spans.bin").open("ab").write(b"x")
    assert token_store.open_store(tmp_path / "s") is None, "a store that is not what it says is none"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("window", [1, 200, 1 << 20])
def test_split_documents_lose_no_token(kind: str, window: int, tmp_path: Path) -> None:
    tokenizer = make(kind, tmp_path)
    encoder, end = Encoder(tokenizer), tokenizer.eos_token_id
    texts = ["今天天气很好。" * count for count in (1, 30, 7)]
    documents = [Document(text, Origin("d", row)) for row, text in enumerate(texts, 1)]
    ledger = Ledger("rows", "tokens")
    store = token_store.in_memory(encode_documents(documents, encoder, end, 16, ledger, window))
    wanted = [[*encoder.prefix, *tokenizer(text, add_special_tokens=False)["input_ids"], end] for text in texts]
    assert store.ids.tolist() == [token for ids in wanted for token in ids]
    assert store.lengths.max() <= 16
    assert store.learned_tokens == len(store.ids) - len(store), "all but the first of each sample"
    assert store.stops.sum() == 3, "each document ends once"
    assert ledger.to_dict()["kept"] == {"rows": 3, "tokens": len(store.ids)}


@pytest.mark.parametrize("window", [1, 200, 1 << 20])
@pytest.mark.parametrize("arrangement", ["apart", "concatenated", "blocks"])
@pytest.mark.parametrize("kind", KINDS)
def test_token_ledger_balances_for_every_arrangement(kind: str, arrangement: str, window: int, tmp_path: Path) -> None:
    tokenizer = make(kind, tmp_path)
    encoder, end = Encoder(tokenizer), tokenizer.eos_token_id
    texts = ["今天天气很好。" * count for count in (1, 30, 7, 2, 11)]
    documents = [Document(text, Origin("d", row)) for row, text in enumerate(texts, 1)]
    ledger = Ledger("rows", "tokens")
    store = token_store.in_memory(encode_documents(documents, encoder, end, 16, ledger, window, arrangement))
    table = ledger.to_dict()
    whole = [[*encoder.prefix, *tokenizer(text, add_special_tokens=False)["input_ids"], end] for text in texts]
    assert table["in"] == {"rows": 5, "tokens": sum(map(len, whole))}
    assert table["kept"]["tokens"] == len(store.ids) and store.lengths.max() <= 16 and store.lengths.min() >= 2
    lost = table["lost"].get("block_remainder", {"rows": 0, "tokens": 0})
    if arrangement == "blocks":
        assert set(store.lengths.tolist()) == {16} and lost["tokens"] > 0
    else:
        assert store.ids.tolist() == [token for ids in whole for token in ids] and not table["lost"]
    if arrangement == "blocks" and window > 1000:
        assert store.ids.tolist() == [token for ids in whole for token in ids][: len(store.ids)]
        assert lost == {"rows": 0, "tokens": len([token for ids in whole for token in ids]) % 16}
    seen = {store.origin(index).row for index in range(len(store))}
    assert len(seen) + lost["rows"] <= 5 and seen <= {1, 2, 3, 4, 5}
    ends = [int((store.sample(index)[0] == end).sum()) for index in range(len(store))]
    assert [count > 0 for count in ends] == store.stops.tolist()


def test_document_has_one_prefix_and_one_end(tmp_path: Path) -> None:
    """Also one that says its own prefix and its own end."""
    tokenizer = make("sentencepiece", tmp_path)
    documents = [Document(text, Origin("d", 1)) for text in ("你好", "<s>你好", "你好</s>", "<s>你好</s>")]
    batches = encode_documents(documents, Encoder(tokenizer), tokenizer.eos_token_id, 64, Ledger("rows", "tokens"))
    store = token_store.in_memory(batches)
    for index in range(4):
        ids = store.sample(index)[0].tolist()
        assert (ids[0], ids[-1]) == (1, 2) and (ids.count(1), ids.count(2)) == (1, 1)


def test_end_of_text_token_of_the_family(tmp_path: Path) -> None:
    """An instruct tokenizer's eos ends an answer, not a document."""
    tokenizer = make("bytes", tmp_path)
    assert tokenizer.eos_token == "<|im_end|>"
    assert end_of_text(tokenizer) == tokenizer.convert_tokens_to_ids("<|endoftext|>")
    assert end_of_text(make("sentencepiece", tmp_path / "b")) == 2
