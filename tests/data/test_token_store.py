"""A store on disk equals one in memory, also after a crash."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from tests.conftest import byte_level_tokenizer
from tests.data.encoding import dialogue
from tongwen.data import token_store
from tongwen.data.encode_dialogues import encode_dialogues
from tongwen.data.encoder import Encoder
from tongwen.data.ledger import Ledger
from tongwen.model.loading.chat_setup import bind_template
from tongwen.recipe.training import Sft


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
