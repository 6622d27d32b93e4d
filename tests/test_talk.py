"""What the user sees is whole characters, and together exactly the decoded answer."""

from __future__ import annotations

import builtins
import random
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import CORPUS, byte_level_tokenizer, sentencepiece_tokenizer
from tongwen.infer.decode import Incremental, Voice
from tongwen.ui.terminal import converse


@pytest.mark.parametrize("kind", ["bytes", "sentencepiece"])
def test_streamed_pieces_are_whole_characters_and_add_up(kind: str, tmp_path: Path) -> None:
    tokenizer = byte_level_tokenizer(tmp_path) if kind == "bytes" else sentencepiece_tokenizer(tmp_path)
    rng = random.Random(0)
    texts = ["😀👍🏽 混合 text，代码 `x = 1`\n\n二", "龘靐", "a b  c", *CORPUS[:4]]
    samples = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    samples += [
        [rng.randrange(3, len(tokenizer)) for _ in range(30)] for _ in range(60)
    ]  # also bytes that are no character
    for ids in samples:
        incremental = Incremental(tokenizer)
        pieces = [incremental.add(index) for index in ids]
        assert "".join([*pieces, incremental.rest()]) == tokenizer.decode(
            ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        if "\ufffd" not in tokenizer.decode(ids):
            assert not any("\ufffd" in piece for piece in pieces)


def conversation(lines: list[str], monkeypatch: pytest.MonkeyPatch, **options: Any) -> list[list[dict[str, Any]]]:
    asked: list[list[dict[str, Any]]] = []
    waiting = iter(lines)

    def reply(messages: list[dict[str, Any]]) -> Any:
        asked.append([dict(message) for message in messages])
        yield f"答{len(asked)}"

    def read(prompt: str = "") -> str:
        try:
            return next(waiting)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr(builtins, "input", read)
    choices: dict[str, Any] = {"name": "m", "system": "", "count": lambda messages: 0, "context": 100} | options
    assert converse(reply, **choices) == 0
    return asked


def test_turns_are_remembered_and_commands_work(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "chat.json"
    asked = conversation(
        [
            "问1",
            "",
            "问2",
            "/retry",
            "/system 简短",
            "问3",
            f"/save {file}",
            "/clear",
            "问4",
            "/nonsense",
            "/exit",
            "问5",
        ],
        monkeypatch,
    )
    assert [message["content"] for message in asked[1]] == ["问1", "答1", "问2"]
    assert asked[2] == asked[1], "/retry asks the same again"
    assert [message["content"] for message in asked[3]] == ["简短", "问3"]
    assert [message["role"] for message in asked[4]] == ["system", "user"]
    assert len(asked) == 5
    assert "答4" in file.read_text(encoding="utf-8")


def test_the_history_is_cut_by_whole_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = conversation(["问1", "问2", "问3"], monkeypatch, system="s", count=len, context=4)
    assert [message["content"] for message in asked[2]] == ["s", "问2", "答2", "问3"]


def test_an_answer_ends_with_a_whole_character(tmp_path: Path) -> None:
    tokenizer = byte_level_tokenizer(tmp_path)
    voice = Voice(None, tokenizer, (), 100)
    ids = tokenizer("好龘", add_special_tokens=False)["input_ids"]
    assert voice.decode(ids) == "好龘"
    assert voice.decode(ids[:-1]) == "好"
