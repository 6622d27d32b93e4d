"""The READMEs of the four older projects, line by line, on tiny models: `tongwen migrate --run -- LINE` for each, in their order.

A line that downloads, installs or compiles is not run; SKIPPED lists them. Names that a README leaves to its reader, such as
path/to/hf/llama/dir, are those that the line before has made.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import CORPUS, byte_level_tokenizer, dialogues, tensors, tiny_llama, type_lines
from tests.migrate.manual_commands import lines_of
from tests.model.chatglm.chatglm_base import chatglm_folder, small_ice  # noqa: F401 (a fixture)

pytestmark = pytest.mark.sample()  # they take minutes: with --all
SKIPPED = ("conda", "pip", "wget", "python download_data.py")
ALPACA = [{"input": "", **row} for row in dialogues(24)]


class Walk:
    """One README's lines in a folder of its own."""

    def __init__(self, name: str, folder: Path, tongwen: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        self.lines = [" ".join(line.arguments) for line in lines_of(name)]
        self.folder, self.tongwen, self.monkeypatch = folder, tongwen, monkeypatch
        self.walked: set[str] = set()
        self.enter(folder)

    def enter(self, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        self.monkeypatch.chdir(folder)

    def write(self, name: str, content: Any) -> None:
        file = Path(name)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(
            content if isinstance(content, str) else json.dumps(content, ensure_ascii=False), encoding="utf-8"
        )

    def run(self, begin: str, typed: tuple[str, ...] = (), number: int = 0, **names: str) -> str:
        """Run the README's line that begins so, the one with this number among several. typed: what its user types; names: for
        what the README leaves open."""
        line = [line for line in self.lines if line.startswith(begin)][number]
        self.walked.add(line)
        for old, new in sorted(names.items(), key=lambda pair: -len(pair[0])):
            assert old in line, (old, line)
            line = line.replace(old, new)
        type_lines(typed, self.monkeypatch)
        code, out, err = self.tongwen("migrate", "--run", "--", *line.split())
        assert code == 0, f"{line}\n{err}\n{out[-2000:]}"
        return str(out)

    def check_complete(self, *alternatives: str) -> None:
        """Check that every line was walked, or needs none. alternatives: beginnings of lines that say the same again."""
        left = [
            line for line in self.lines if line not in self.walked and not line.startswith((*SKIPPED, *alternatives))
        ]
        assert not left, left


@pytest.fixture()
def walk(request: pytest.FixtureRequest, tmp_path: Path, tongwen: Any, monkeypatch: pytest.MonkeyPatch) -> Walk:
    return Walk(request.param, tmp_path, tongwen, monkeypatch)


@pytest.mark.parametrize("walk", ["belle"], indirect=True)
def test_belle(walk: Walk) -> None:
    from transformers import BloomConfig, BloomForCausalLM

    for method, bloom, llama in (("full", "deepspeed", "deepspeed"), ("lora", "torchrun", "torchrun")):
        walk.enter(walk.folder / method)
        base = Path("bigscience/bloomz-7b1-mt")
        size = len(byte_level_tokenizer(base))
        torch.manual_seed(0)
        BloomForCausalLM(BloomConfig(vocab_size=size, hidden_size=64, n_layer=2, n_head=4)).save_pretrained(base)
        tiny_llama(Path("yahma/llama-7b-hf"), len(byte_level_tokenizer(Path("yahma/llama-7b-hf"))))
        walk.write("data_dir/Belle_open_source_0.5M.dev.json", ALPACA)
        walk.run(bloom, number=0)
        walk.run(llama, number=1)
        if method == "full":
            walk.run("python generate.py")
        else:  # "if it is a LoRA model, --lora_weights"
            line = "--model_name_or_path bigscience/bloomz-7b1-mt --lora_weights trained_models/bloom"
            walk.run("python generate.py", **{"--model_name_or_path trained_models/bloom/": line})
        answers = json.loads(Path("data_dir/predictions.json").read_text(encoding="utf-8"))
        assert len(answers) == len(ALPACA)
    walk.check_complete("CUDA_VISIBLE_DEVICES=0 python finetune.py")


@pytest.mark.parametrize("walk", ["guanaco"], indirect=True)
def test_chinese_llm_chat(walk: Walk) -> None:
    base = Path("decapoda-research/llama-7b-hf")
    tiny_llama(base, len(byte_level_tokenizer(base)))
    walk.write("dataset/merge.json", ALPACA)
    walk.run("accelerate config")
    walk.run("accelerate env")
    walk.run("CUDA_VISIBLE_DEVICES=0 python finetune.py")
    walk.run("python merge_lora.py")
    out = walk.run("python cli_demo.py", ("你好",))
    assert "models/llama-7b-hf-finetune" in out
    walk.check_complete("torchrun", "accelerate launch", "python gradio_ui.py")  # the page: tests/serving/web


@pytest.mark.parametrize("walk", ["ner"], indirect=True)
def test_chinese_llm_sft(walk: Walk, small_ice: Path) -> None:  # noqa: F811
    chatglm_folder(Path("model_hub/chatglm-6b"), small_ice)
    rows = [{"instruct": "找出地名。", "query": f"文本：第{n}天到了郑州。", "answer": "郑州_地名"} for n in range(24)]
    walk.write("data/msra/train.txt", "\n".join(json.dumps(row, ensure_ascii=False) for row in rows))
    walk.run("torchrun")
    walk.check_complete()
    type_lines(("你好", "晚上睡不着应该怎么办"), walk.monkeypatch)  # test_sft_model.py
    code, _out, err = walk.tongwen(
        "chat", "model_hub/chatglm-6b", "--adapter", "output_dir/sft", "--max-new-tokens", "8"
    )
    assert code == 0, err


@pytest.mark.parametrize("walk", ["cla"], indirect=True)
def test_chinese_llama_alpaca(walk: Walk) -> None:
    make_original(walk)
    walk.run("python -m transformers.models.llama.convert_llama_weights_to_hf --input_dir llama-weights")
    walk.run(
        "python scripts/merge_tokenizers.py",
        **{"llama_tokenizer_dir llama_tokenizer_dir": "llama_tokenizer_dir llama-hf-weights"},
    )
    walk.write("pt/a.txt", "\n".join(f"第{number}天，{text}" for number in range(30) for text in CORPUS[:4]))
    walk.run(
        "torchrun --nnodes 1 --nproc_per_node 1 run_clm_pt_with_peft.py",
        **{"path/to/hf/llama/dir": "llama-hf-weights", "path/to/chinese/llama/tokenizer/dir": "merged_tokenizer_hf",
           "path/to/pt/data/dir": "pt", "--output_dir output_dir": "--output_dir llama-lora"},
    )  # fmt: skip
    merge = "python scripts/merge_llama_with_chinese_lora.py"
    original = {"path_to_original_llama_hf_dir": "llama-hf-weights"}
    as_model = {**original, "[pth|huggingface]": "huggingface"}
    walk.run(merge, **as_model, path_to_chinese_llama_or_alpaca_lora="llama-lora", path_to_output_dir="chinese-llama")
    walk.write("sft/a.json", ALPACA)
    walk.write("validation.json", ALPACA[:2])
    walk.run(
        "torchrun --nnodes 1 --nproc_per_node 1 run_clm_sft_with_peft.py",
        **{"path/to/hf/llama/or/merged/llama/dir/or/model_id": "chinese-llama", "path/to/chinese/llama/tokenizer/dir": "merged_tokenizer_hf",
           "path/to/sft/data/dir": "sft", "validation_file_name": "validation.json", "--output_dir output_dir": "--output_dir alpaca-lora",
           " --peft_path path/to/peft/model/dir": ""},  # "remove --peft_path" for a new LoRA
    )  # fmt: skip
    both = {"path_to_chinese_llama_plus_lora": "llama-lora", "path_to_chinese_alpaca_plus_lora": "alpaca-lora"}
    walk.run(merge, number=1, **as_model, **both, path_to_output_dir="chinese-alpaca")
    assert walk.tongwen("merge", "--base", "chinese-llama", "--adapter", "alpaca-lora/sft", "--out", "twice")[0] == 0
    once, twice = tensors(Path("chinese-alpaca")), tensors(Path("twice"))
    assert once.keys() == twice.keys()
    for name in once:
        torch.testing.assert_close(once[name], twice[name], rtol=0, atol=1e-5)
    walk.run(
        "CUDA_VISIBLE_DEVICES=0 python scripts/inference_hf.py",
        ("你好",),
        **original,
        path_to_chinese_llama_or_alpaca_lora="llama-lora",
    )
    walk.run(
        "CUDA_VISIBLE_DEVICES=0 python scripts/inference_hf.py",
        ("你好",),
        number=1,
        path_to_merged_llama_or_alpaca_hf_dir="chinese-alpaca",
    )
    walk.run(merge, number=1, **{**as_model, "[pth|huggingface]": "pth"}, **both, path_to_output_dir="for-llama.cpp")
    made = Path("for-llama.cpp")
    assert (made / "tokenizer.model").read_bytes() == Path("merged_tokenizer_hf/tokenizer.model").read_bytes()
    assert walk.tongwen("convert", made, "--to", "gguf", "--out", "gguf")[0] == 0
    walk.check_complete(
        "torchrun --nnodes ${num_nodes}", "python -m transformers.models", "python scripts/merge_tokenizers.py"
    )


def make_original(walk: Walk) -> None:
    """LLaMA's download with a tiny model, and a SentencePiece model of Chinese pieces."""
    from tongwen.model.loading import sentencepiece
    from tongwen.vocab.train import train_sentencepiece

    english = train_sentencepiece(
        ["the weather is fine today", "all of us like to read", "use the same words"] * 9, 290, "bpe", 0
    )
    Path("llama-weights").mkdir()
    Path("chinese_sp_model_file").write_bytes(train_sentencepiece(CORPUS, 420, "bpe", 0))
    tiny_llama(Path("tiny"), len(sentencepiece.parse(english, "model").pieces), tie_word_embeddings=False)
    Path("tiny/tokenizer.model").write_bytes(english)
    assert walk.tongwen("convert", "tiny", "--to", "pth", "--out", "llama-weights/7B")[0] == 0
