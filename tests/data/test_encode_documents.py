"""Documents: no token is lost, the ledger balances, prefix and end stand once."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.data.encoding import KINDS, make
from tongwen.core.records import Document, Origin
from tongwen.data import token_store
from tongwen.data.encode_documents import encode_documents
from tongwen.data.encoder import Encoder
from tongwen.data.ledger import Ledger


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
