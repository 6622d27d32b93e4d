"""What one command leaves, the next one takes, in the order in which a user types them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.conftest import dialogues, tensors, write_rows
from tongwen.cli.main import main


@pytest.fixture(scope="module")
def chain(chat_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The chain of Chinese-LLaMA-Alpaca: a larger vocabulary, an adapter with its rows, a merge onto the original base, and an
    adapter on the merged model."""
    folder = tmp_path_factory.mktemp("chain")
    texts = [{"text": f"第{number}天，月亮自己不会发光，它反射太阳的光。" * 3} for number in range(40)]
    shape = "max_length: 64, batch_size: 4, samples: 0, precision: fp32, learning_rate: 1e-2, stop_after: 3 steps"
    first = folder / "first.yaml"
    first.write_text(
        f"name: first\nbase: {chat_model}\nout: {folder / 'first'}\n"
        f"prepare: {{documents: {write_rows(folder / 'a.jsonl', texts)}, held_out: 4, dedup: {{documents: 'off'}}}}\n"
        f"vocab: {{pieces: 8}}\npretrain: {{train: lora+embeddings, adapter: {{rank: 4}}, {shape}}}\n",
        encoding="utf-8",
    )
    assert main(["run", str(first)]) == 0
    adapter = folder / "first" / "pretrain"
    assert main(["merge", "--base", str(chat_model), "--adapter", str(adapter), "--out", str(folder / "merged")]) == 0
    second = folder / "second.yaml"
    second.write_text(
        f"name: second\nbase: {folder / 'merged'}\nout: {folder / 'second'}\n"
        f"prepare: {{dialogues: {write_rows(folder / 'b.jsonl', dialogues(24))}, held_out: 4}}\n"
        f"sft: {{template: chatml, adapter: {{rank: 4}}, {shape}}}\n",
        encoding="utf-8",
    )
    assert main(["run", str(second)]) == 0
    return folder


def merge(chain: Path, base: Path, out: str, *adapters: str) -> tuple[int, Path]:
    options = [word for name in adapters for word in ("--adapter", str(chain / name))]
    return main(["merge", "--base", str(base), *options, "--out", str(chain / out)]), chain / out


def test_an_adapter_with_its_rows_merges_onto_the_original_base(chain: Path, chat_model: Path) -> None:
    code, usual = merge(chain, chain / "first" / "vocab", "usual", "first/pretrain")
    assert code == 0
    here, there = tensors(chain / "merged"), tensors(usual)
    assert here.keys() == there.keys() and all(torch.equal(here[name], there[name]) for name in here)


def test_two_adapters_at_once_are_what_two_merges_are(chain: Path, chat_model: Path) -> None:
    code, twice = merge(chain, chain / "merged", "twice", "second/sft")
    assert code == 0
    code, once = merge(chain, chat_model, "once", "first/pretrain", "second/sft")
    assert code == 0
    here, there = tensors(once), tensors(twice)
    assert here.keys() == there.keys()
    for name in here:
        torch.testing.assert_close(here[name], there[name], rtol=0, atol=1e-5)


def test_base_and_adapters_answer_as_the_merged_model(chain: Path, chat_model: Path) -> None:
    questions, answers = chain / "questions.txt", list[str]()
    questions.write_text("你好\n今天天气怎么样？\n", encoding="utf-8")
    for name, model in (("live", [str(chat_model), "first/pretrain", "second/sft"]), ("whole", [str(chain / "once")])):
        base, *adapters = model
        if name == "whole" and not (chain / "once").is_dir():
            assert merge(chain, chat_model, "once", "first/pretrain", "second/sft")[0] == 0
        options = [word for one in adapters for word in ("--adapter", str(chain / one))]
        out = chain / f"{name}.jsonl"
        line = ["generate", "--model", base, *options, "--prompts", str(questions), "--out", str(out)]
        assert main([*line, "--template", "chatml", "--max-new-tokens", "8"]) == 0
        answers.append(out.read_text(encoding="utf-8"))
    assert answers[0] == answers[1]


def test_what_does_not_stand_on_its_base_is_refused(chain: Path, chat_model: Path, other_model: Path) -> None:
    assert merge(chain, chat_model, "alone", "second/sft")[0] == 4
    assert merge(chain, chat_model, "turned", "second/sft", "first/pretrain")[0] == 4
    assert merge(chain, other_model, "other", "first/pretrain")[0] == 4
    assert merge(chain, other_model, "both", "first/pretrain", "second/sft")[0] == 4
