"""The READMEs' own command lines, word for word, in a folder where the model that they name is a tiny one of its family."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import byte_level_tokenizer, dialogues, sentencepiece_tokenizer, tiny_llama, write_rows
from tests.test_chatglm import chatglm_folder, small_ice  # noqa: F401 (a fixture)
from tests.test_migrate import WANTED, lines_of

TEXT = [
    "今天天气很好，我们去公园散步吧。",
    "The quick brown fox jumps over the lazy dog.",
    "人工智能可以帮助我们学习语言。",
]


def bloom(folder: Path) -> None:
    from transformers import BloomConfig, BloomForCausalLM

    tokenizer = byte_level_tokenizer(folder)
    BloomForCausalLM(BloomConfig(vocab_size=len(tokenizer), hidden_size=32, n_layer=2, n_head=4)).save_pretrained(
        folder
    )


def llama(folder: Path) -> None:
    tiny_llama(folder, len(sentencepiece_tokenizer(folder)), hidden_size=64, intermediate_size=128)


def llama_of_pieces(folder: Path) -> None:
    """With a tokenizer.model, as LLaMA's is, and beside it one that knows more Chinese."""
    from tongwen.vocab.train import train_sentencepiece

    folder.mkdir(parents=True)
    (folder / "tokenizer.model").write_bytes(train_sentencepiece(TEXT[1:2] * 20, 300, "bpe", 0))
    tiny_llama(folder, 300, tie_word_embeddings=False)


def belle(here: Path) -> None:
    write_rows(here / "data_dir" / "0.5M" / "Belle_open_source_0.5M.dev.json", dialogues(6))
    bloom(here / "bigscience" / "bloomz-7b1-mt")
    llama(here / "decapoda-research" / "llama-7b-hf")


def guanaco(here: Path) -> None:
    (here / "dataset").mkdir()
    (here / "dataset" / "merge.json").write_text(json.dumps(dialogues(30)), encoding="utf-8")
    llama(here / "decapoda-research" / "llama-7b-hf")


def cla(here: Path) -> None:
    from tongwen.vocab.train import train_sentencepiece

    base = here / "path/to/hf/llama"
    llama_of_pieces(base / "dir")
    (here / "chinese.model").write_bytes(train_sentencepiece(TEXT[:1] * 20, 280, "bpe", 0))
    llama(base / "or/merged/llama/dir/or/model_id")
    adapter(base / "or/merged/llama/dir/or/model_id", here / "path/to/peft/model/dir")
    (here / "path/to/pt/data/dir").mkdir(parents=True)
    (here / "path/to/pt/data/dir" / "a.txt").write_text("\n".join(f"{text}{n}" for n in range(40) for text in TEXT))
    (here / "path/to/sft/data/dir").mkdir(parents=True)
    (here / "path/to/sft/data/dir" / "a.json").write_text(json.dumps(dialogues(30)), encoding="utf-8")
    (here / "validation_file_name").write_text(json.dumps(dialogues(34)[30:]), encoding="utf-8")


def adapter(base: Path, folder: Path) -> None:
    """What the 2023 scripts left: rank 8, alpha 32, every linear layer."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    config = LoraConfig(r=8, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(folder)


def ner(here: Path) -> None:
    """Rows of instruct, query and answer in a .txt file, as entities were asked for."""
    rows = [{"instruct": "找出地名。", "query": f"文本：我们去公园{n}。", "answer": "公园_地名"} for n in range(30)]
    write_rows(here / "data" / "msra" / "train.txt", rows)
    chatglm_folder(here / "model_hub" / "chatglm-6b", here / "ice_text.model")


WORLDS = {"belle": belle, "guanaco": guanaco, "cla": cla, "ner": ner}


# The lines of the same README that go on with what a training line left: asking, merging, talking.
FOLLOWING = {"belle:7": [9], "guanaco:2": [6, 7]}


# Lines that differ from these in their launcher alone are compared in test_migrate.
@pytest.mark.parametrize("name", ["belle:5", "belle:7", "guanaco:2", "cla:31", "cla:33", "ner:1"])
def test_a_training_line_leaves_the_manifest_that_its_readme_promised(
    name: str,
    tongwen: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    small_ice: Path,  # noqa: F811
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copy(small_ice, tmp_path)
    readme, place = name.split(":")
    WORLDS[readme](tmp_path)
    if name == "cla:31":
        merging = ["tokenizer", "merge", "--base", "path/to/hf/llama/dir/tokenizer.model", "--add", "chinese.model"]
        assert tongwen(*merging, "--out", "path/to/chinese/llama/tokenizer/dir")[0] == 0
    code, _, said = tongwen("migrate", "--run", "--", *lines_of(readme)[int(place) - 1].words)
    assert code == 0, said
    section, batch, rate, rank, targets, length, template, stop = WANTED[name]
    (manifest,) = tmp_path.rglob(f"{section}/manifest.json")
    words = json.loads(manifest.read_text(encoding="utf-8"))["settings"][section]
    assert (words["batch_size"], words["learning_rate"], words["max_length"]) == (batch, rate, length)
    assert words["stop_after"] == stop
    assert template in (None, words.get("template"))
    if rank is not None:
        assert (words["adapter"]["rank"], words["adapter"]["targets"]) == (rank, targets)
    for line in FOLLOWING.get(name, ()):
        monkeypatch.setattr("sys.stdin", io.StringIO("你好\n"))
        code, _, said = tongwen("migrate", "--run", "--", *lines_of(readme)[line - 1].words)
        assert code == 0, said
    if name == "guanaco:2":
        assert (tmp_path / "models" / "llama-7b-hf-finetune" / "model.safetensors").is_file()
    if name == "belle:7":
        answered = json.loads((tmp_path / "data_dir" / "predictions.json").read_text(encoding="utf-8"))
        assert len(answered) == 6 and answered[0].keys() == {"input", "predict", "target"}
