"""A file that is dropped on the page: what is counted, what is refused and why, what would be learned."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.conftest import dialogues, write_rows
from tongwen.core.errors import DataError
from tongwen.workflows import data_preview


def test_rows_are_counted_and_refusals_name_their_row(chat_model: Path, tmp_path: Path) -> None:
    file = write_rows(tmp_path / "rows.jsonl", dialogues(20))
    lines = file.read_text(encoding="utf-8").splitlines()
    lines[3] = '{"instruction": "坏的'
    lines[7] = json.dumps({"instruction": "问", "input": "", "output": ""})
    lines[9] = json.dumps({"instruction": "<b>问</b>", "input": "", "output": "答 <|im_end|>"})
    file.write_text("\n".join(lines), encoding="utf-8")
    found = data_preview.inspect(file)
    assert (found.kind, found.format) == ("dialogues", "alpaca")
    assert (found.counts.ledger.items_in, found.counts.ledger.kept) == (20, 18)
    assert [(row, reason) for row, reason, _, _ in found.problems] == [(4, "not_json"), (8, "empty_answer")]
    rows = data_preview.as_html(found)
    assert "not_json" in rows and "empty_answer" in rows and "坏的" in rows
    samples = data_preview.samples_as_html(found, str(chat_model), "chatml")
    assert "control_token_in_text" in samples, "what this model does not take is listed too"
    assert "<b>" not in samples
    shown = re.findall(r"<p class=tokens>(.*?)</p>", samples, re.DOTALL)
    assert len(shown) == data_preview.SHOWN
    learned = "".join(re.findall(r'<span class="l"[^>]*>(.*?)</span>', shown[0], re.DOTALL))
    assert learned == dialogues(1)[0]["output"]
    assert len(re.findall('class="s"', shown[0])) == 1


def test_data_preview_works_when_the_model_cannot_read_the_file(chat_model: Path, tmp_path: Path) -> None:
    pytest.importorskip("starlette")
    from tongwen.commands.web import make_backend
    from tongwen.serving.web.backend import ChatBackend
    from tongwen.workflows.workspace import Workspace

    file = write_rows(tmp_path / "rows.jsonl", dialogues(3))
    place = Workspace.of([str(tmp_path)], [str(chat_model)], uploads=str(tmp_path))
    look = make_backend(place, ChatBackend(list, (), lambda *_: [], lambda *_: iter(()))).data
    assert look
    rows, samples = look.inspect(str(file), str(chat_model), "own")
    assert "alpaca" in rows and "the model has no chat template of its own" in samples


def test_documents_are_learned_whole(chat_model: Path, tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text("今天天气很好。\n我们去公园散步吧。\n", encoding="utf-8")
    found = data_preview.inspect(file)
    assert (found.kind, found.format, found.problems) == ("documents", "text", [])
    samples = data_preview.samples_as_html(found, str(chat_model), "own")
    assert samples.count('class="p"') == 2, "the first piece of a document is predicted by nothing"
    assert "公园" in re.sub("<[^>]*>", "", samples)


@pytest.mark.parametrize("content", [b"", b"\x00\x01\x02\xff" * 40])
def test_non_data_file_raises_with_remedy(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "x.jsonl"
    file.write_bytes(content)
    with pytest.raises(DataError):
        data_preview.inspect(file)
