"""The llama.cpp backend answers a GGUF file: streamed and in batches, with the prompt ids of the transformers backend."""

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
def gguf_chat(file: Path) -> ChatModel:
    return open_chat_model(str(file), template="chatml")


def test_streamed_text_matches_the_batch_text(gguf_chat: ChatModel) -> None:
    """A model of random weights says bytes that are no characters, too: no id of them is lost."""
    for text in ("你好", "👍🏽 龘靐", "x = 1"):
        ids = gguf_chat.prompt_ids([{"role": "user", "content": text}])
        whole: dict[int, list[int]] = {}
        gguf_chat.generator.answer_all([ids], Sampling(max_new_tokens=40), whole.__setitem__)
        heard: list[int] = []
        pieces = list(gguf_chat.generator.stream(ids, Sampling(max_new_tokens=40), heard.append))
        assert gguf_chat.generator._until_stop(heard) == whole[0]
        assert "".join(pieces) == gguf_chat.generator.decode(whole[0]) and len(pieces) > 1
        assert len(heard) == 40 or gguf_chat.ended(heard)


def test_sampling_settings_are_applied(gguf_chat: ChatModel) -> None:
    def generate(**settings: Any) -> str:
        return "".join(gguf_chat.stream(ASK, max_new_tokens=24, **settings))

    greedy = generate()
    assert generate(temperature=1.5, seed=1) == generate(temperature=1.5, seed=1) != generate(temperature=1.5, seed=2)
    assert generate(temperature=1.5, seed=1) != greedy == generate(temperature=1.5, seed=1, top_k=1)
    assert generate(repetition_penalty=10.0) != greedy
    heard: list[int] = []
    list(gguf_chat.stream(ASK, heard.append, max_new_tokens=24, repetition_penalty=10.0))
    assert len(set(heard)) == len(heard), "no token repeats under such a penalty"
    drawn: list[int] = []
    list(gguf_chat.stream(ASK, drawn.append, max_new_tokens=24, temperature=2.0, seed=3))
    assert len(set(drawn)) > 12, "each token is drawn by a number of its own"
    assert gguf_chat.chat(ASK, max_new_tokens=24) == greedy


def test_abandoned_answer_frees_its_slot(gguf_chat: ChatModel) -> None:
    assert isinstance(gguf_chat.generator, LlamaCppBackend)
    for _ in range(gguf_chat.generator.slots + 1):
        pieces = gguf_chat.stream(ASK, max_new_tokens=40)
        assert next(pieces)
        pieces.close()  # type: ignore[attr-defined]
    assert "".join(gguf_chat.stream(ASK, max_new_tokens=4)) == gguf_chat.chat(ASK, max_new_tokens=4)


def test_cache_memory_is_limited(
    file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = open_chat_model(str(file), template="chatml", rows=3).generator
    assert isinstance(whole, LlamaCppBackend) and whole.slots == 3
    monkeypatch.setattr(llamacpp, "CACHE", 1 << 12)
    monkeypatch.setattr(llamacpp, "MIN_CONTEXT", 100)
    gguf_chat = open_chat_model(str(file), template="chatml")
    assert isinstance(gguf_chat.generator, LlamaCppBackend)
    assert (gguf_chat.generator.slots, gguf_chat.context) == (1, 100) and gguf_chat.context < whole.context
    assert "the context is limited to 100 of" in capsys.readouterr().out
    heard: list[int] = []
    list(gguf_chat.stream(ASK, heard.append, max_new_tokens=400))
    assert len(gguf_chat.prompt_ids(ASK)) + len(heard) == 100 or gguf_chat.ended(heard)


def test_terminal_names_the_engine(file: Path, tongwen: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def chat() -> str:
        type_lines(["问"], monkeypatch)
        code, out, err = tongwen("chat", file, "--template", "chatml", "--max-new-tokens", 8)
        assert code == 0, err
        return str(out)

    assert f"{file.name}: llama.cpp answers" in chat()
    monkeypatch.setattr(llamacpp, "is_installed", lambda: False)
    shown = chat()
    assert "transformers unpacks it and answers" in shown and "pip install 'tongwen[llamacpp]'" in shown


def test_transformers_is_used_without_xllamacpp(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llamacpp, "is_installed", lambda: False)
    gguf_chat = open_chat_model(str(file), template="chatml")
    assert type(gguf_chat.generator) is TextGenerator
    assert isinstance(gguf_chat.chat(ASK, max_new_tokens=4), str)


def test_load_option_is_refused_for_gguf(file: Path, tongwen: Any) -> None:
    code, _, err = tongwen("chat", file, "--load", "8bit")
    assert code == 4 and f"{file} · --load 8bit" in err and "--load full" in err
