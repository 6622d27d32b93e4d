"""A .gguf file is answered by llama.cpp, word by word and all at once, with the ids and the text of the other engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("xllamacpp")

from tests.conftest import type_lines
from tongwen.infer import llamacpp
from tongwen.infer.generation import Sampling, TextGenerator
from tongwen.infer.llamacpp import LlamaCppBackend
from tongwen.workflows.chat_model import ChatModel, open_chat_model

ASK = [{"role": "user", "content": "你好，👍🏽 龘靐？"}]


@pytest.fixture(scope="module")
def file(chat_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tongwen.cli.main import main

    out = tmp_path_factory.mktemp("gguf") / "out"
    assert main(["convert", str(chat_model), "--to", "gguf", "--quantize", "f32", "--out", str(out)]) == 0
    return next(out.glob("*.gguf"))


@pytest.fixture(scope="module")
def speaker(file: Path) -> ChatModel:
    return open_chat_model(str(file), template="chatml")


def test_what_is_streamed_is_what_is_said_at_once(speaker: ChatModel) -> None:
    """A model of random weights says bytes that are no characters, too: no id of them is lost."""
    for text in ("你好", "👍🏽 龘靐", "x = 1"):
        ids = speaker.prompt_ids([{"role": "user", "content": text}])
        whole: dict[int, list[int]] = {}
        speaker.generator.answer_all([ids], Sampling(max_new_tokens=40), whole.__setitem__)
        heard: list[int] = []
        pieces = list(speaker.generator.stream(ids, Sampling(max_new_tokens=40), heard.append))
        assert speaker.generator._until_stop(heard) == whole[0]
        assert "".join(pieces) == speaker.generator.decode(whole[0]) and len(pieces) > 1
        assert len(heard) == 40 or speaker.ended(heard)


def test_words_about_sampling_are_obeyed(speaker: ChatModel) -> None:
    def said(**words: Any) -> str:
        return "".join(speaker.stream(ASK, max_new_tokens=24, **words))

    greedy = said()
    assert said(temperature=1.5, seed=1) == said(temperature=1.5, seed=1) != said(temperature=1.5, seed=2)
    assert said(temperature=1.5, seed=1) != greedy == said(temperature=1.5, seed=1, top_k=1)
    assert said(repetition_penalty=10.0) != greedy
    heard: list[int] = []
    list(speaker.stream(ASK, heard.append, max_new_tokens=24, repetition_penalty=10.0))
    assert len(set(heard)) == len(heard), "nothing is said twice under such a penalty"
    drawn: list[int] = []
    list(speaker.stream(ASK, drawn.append, max_new_tokens=24, temperature=2.0, seed=3))
    assert len(set(drawn)) > 12, "each token is drawn by a number of its own"
    assert speaker.chat(ASK, max_new_tokens=24) == greedy


def test_an_answer_that_is_given_up_leaves_its_slot(speaker: ChatModel) -> None:
    assert isinstance(speaker.generator, LlamaCppBackend)
    for _ in range(speaker.generator.slots + 1):
        pieces = speaker.stream(ASK, max_new_tokens=40)
        assert next(pieces)
        pieces.close()  # type: ignore[attr-defined]
    assert "".join(speaker.stream(ASK, max_new_tokens=4)) == speaker.chat(ASK, max_new_tokens=4)


def test_it_takes_no_more_memory_than_it_may(
    file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = open_chat_model(str(file), template="chatml", rows=3).generator
    assert isinstance(whole, LlamaCppBackend) and whole.slots == 3
    monkeypatch.setattr(llamacpp, "CACHE", 1 << 12)
    monkeypatch.setattr(llamacpp, "MIN_CONTEXT", 100)
    speaker = open_chat_model(str(file), template="chatml")
    assert isinstance(speaker.generator, LlamaCppBackend)
    assert (speaker.generator.slots, speaker.context) == (1, 100) and speaker.context < whole.context
    assert "sees at most 100 tokens here" in capsys.readouterr().out
    heard: list[int] = []
    list(speaker.stream(ASK, heard.append, max_new_tokens=400))
    assert len(speaker.prompt_ids(ASK)) + len(heard) == 100 or speaker.ended(heard)


def test_the_terminal_says_who_answers(file: Path, tongwen: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def chat() -> str:
        type_lines(["问"], monkeypatch)
        code, out, err = tongwen("chat", file, "--template", "chatml", "--max-new-tokens", 8)
        assert code == 0, err
        return str(out)

    assert f"{file.name}: llama.cpp answers" in chat()
    monkeypatch.setattr(llamacpp, "is_installed", lambda: False)
    said = chat()
    assert "transformers unpacks it and answers" in said and "pip install 'tongwen[llamacpp]'" in said


def test_without_the_wheel_transformers_answers(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llamacpp, "is_installed", lambda: False)
    speaker = open_chat_model(str(file), template="chatml")
    assert type(speaker.generator) is TextGenerator
    assert isinstance(speaker.chat(ASK, max_new_tokens=4), str)


def test_the_bits_of_a_file_are_its_own(file: Path, tongwen: Any) -> None:
    code, _, err = tongwen("chat", file, "--load", "8bit")
    assert code == 4 and f"{file} · --load 8bit" in err and "--load full" in err
