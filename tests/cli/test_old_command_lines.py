"""The READMEs' own command lines, word for word, in a folder where the model that they name is a tiny one of its family."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.adapters import disturb
from tests.conftest import byte_level_tokenizer, dialogues, sentencepiece_tokenizer, tensors, tiny_llama, write_rows
from tests.hub.hub_server import LINES, MODEL, WEIGHTS, Hub, Repo
from tests.migrate.manual_commands import LINEAR, WANTED, lines_of
from tests.model.chatglm.chatglm_base import chatglm_folder
from tongwen.workflows.chat_model import open_chat_model

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

# Lines that use the result of a training line: they ask, merge, chat, look. Those of other names are in the text
# of a README, or are what it describes.
ASK_WITH_LORA = [
    *("python", "generate.py", "--dev_file", "data_dir/Belle_open_source_0.5M.dev.json"),
    *("--model_name_or_path", "decapoda-research/llama-7b-hf", "--lora_weights", "trained_models/Llama"),
]
FOLLOWING: dict[str, list[str | list[str]]] = {
    "belle:7": ["belle:9"],
    "belle:8": [ASK_WITH_LORA],
    "guanaco:2": ["guanaco:6", "guanaco:7", "guanaco:8"],
    "guanaco:5": ["guanaco:3", "guanaco:4"],
    "ner:1": [f"mentioned:{place}" for place in range(3, 8)],
}


def read_argv(name: str | list[str]) -> list[str]:
    readme, place = name.split(":") if isinstance(name, str) else ("", "")
    return [*lines_of(readme)[int(place) - 1].arguments] if isinstance(name, str) else name


@pytest.fixture()
def again(tongwen: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[[str | list[str]], str]:
    """Runs an old line; a chat gets one question. Returns the output."""

    def run(name: str | list[str]) -> str:
        monkeypatch.setattr("sys.stdin", io.StringIO("你好\n"))
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)  # set by some lines, and put back afterwards
        code, out, err = tongwen("migrate", "--run", "--", *read_argv(name))
        assert code == 0, err
        return str(out)

    return run


@pytest.fixture()
def visited(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """A page is visited once instead of served until Ctrl-C: the answer, and where its knobs stood."""
    pytest.importorskip("starlette")
    from tests.serving.web import page_server

    seen: list[Any] = []

    def serve(backend: Any, host: str, port: int) -> int:
        with page_server.serving(backend) as address, page_server.client(address) as web:
            knobs = web.get("/en/api/state").json()["sampling"]
            seen.append(
                (page_server.ask(address, "你好", model=backend.chat.chosen[0])["text"], list(knobs.values())[:5])
            )
        return 0

    monkeypatch.setattr("tongwen.serving.web.server.serve", serve)
    return seen


@pytest.mark.sample()
@pytest.mark.parametrize("name", WANTED)
def test_training_command_writes_the_settings_of_its_readme(
    name: str,
    again: Callable[[str | list[str]], str],
    visited: list[Any],
    tongwen: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    small_ice: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copy(small_ice, tmp_path)
    WORLDS[name.split(":")[0]](tmp_path)
    if name == "cla:31":
        merging = ["tokenizer", "merge", "--base", "path/to/hf/llama/dir/tokenizer.model", "--add", "chinese.model"]
        assert tongwen(*merging, "--out", "path/to/chinese/llama/tokenizer/dir")[0] == 0
    again(name)
    section, batch, rate, rank, targets, length, template, stop = WANTED[name]
    (manifest,) = tmp_path.rglob(f"{section}/manifest.json")
    settings = json.loads(manifest.read_text(encoding="utf-8"))["settings"][section]
    assert (settings["batch_size"], settings["learning_rate"], settings["max_length"]) == (batch, rate, length)
    assert settings["stop_after"] == stop
    assert template in (None, settings.get("template"))
    if rank is not None:
        assert (settings["adapter"]["rank"], settings["adapter"]["targets"]) == (rank, targets)
    outputs = [again(line) for line in FOLLOWING.get(name, ())]
    if name in ("belle:7", "belle:8"):
        answered = json.loads((tmp_path / "data_dir" / "predictions.json").read_text(encoding="utf-8"))
        assert len(answered) == 6 and answered[0].keys() == {"input", "predict", "target"}
    if name == "guanaco:2":
        assert (tmp_path / "models" / "llama-7b-hf-finetune" / "model.safetensors").is_file()
        ((answer, knobs),) = visited
        assert answer and knobs == [512, 0.95, 0.7, 50, 1.0], "the page begins as the script's did"
    if name == "guanaco:5":
        assert "torch" in outputs[1], "doctor reports what `accelerate env` reports"
    if name == "ner:1":
        layers, samples, tokens, *_ = outputs
        assert "query_key_value" in layers and "公园_地名" in samples and "msra/train.txt" in tokens


# -- Chinese-LLaMA-Alpaca: from LLaMA's own files to a conversation ---------------------------------------------------


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What could be downloaded, in small: LLaMA's files, a Chinese SentencePiece model, adapters with more rows for it."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from tongwen.cli.main import main
    from tongwen.vocab.train import train_sentencepiece

    here = tmp_path_factory.mktemp("published")
    base, chinese = here / "path_to_original_llama_hf_dir", here / "scripts" / "chinese_sp.model"
    llama_of_pieces(base)
    chinese.parent.mkdir()
    chinese.write_bytes(train_sentencepiece(TEXT[:1] * 20, 280, "bpe", 0))
    shutil.copy(chinese, here / "chinese_sp_model_file")
    (here / "llama_tokenizer_dir").mkdir()
    for folder in ("llama-weights", "."):
        assert main(["convert", str(base), "--to", "pth", "--out", str(here / folder / "7B")]) == 0
        shutil.move(here / folder / "7B" / "tokenizer.model", here / folder / "tokenizer.model")
    shutil.copy(here / "tokenizer.model", here / "llama_tokenizer_dir")
    merged = here / "chinese"
    line = ["tokenizer", "merge", "--base", str(here / "tokenizer.model"), "--add", str(chinese)]
    assert main([*line, "--mode", "legacy", "--out", str(merged)]) == 0
    names = ("chinese_llama_or_alpaca", "chinese_llama_plus", "chinese_alpaca_plus")
    for seed, name in enumerate(names):
        model = AutoModelForCausalLM.from_pretrained(base)
        model.resize_token_embeddings(320)
        whole = {"modules_to_save": ["embed_tokens", "lm_head"], "target_modules": LINEAR}
        adapted = get_peft_model(model, LoraConfig(r=8, lora_alpha=32, task_type="CAUSAL_LM", **whole))
        disturb(adapted, seed)
        adapted.save_pretrained(here / f"path_to_{name}_lora", save_embedding_layers=False)
        for file in ("tokenizer.model", "tokenizer_config.json"):
            shutil.copy(merged / file, here / f"path_to_{name}_lora")
    return here


@pytest.fixture()
def here(published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(shutil.copytree(published, tmp_path / "here"))
    return Path.cwd()


@pytest.mark.parametrize(("name", "made"), [("cla:27", "llama-hf-weights"), ("cla:28", "output/7B-hf")])
def test_llama_pth_files_convert_to_the_same_model(
    name: str, made: str, again: Callable[[str | list[str]], str], here: Path
) -> None:
    again(name)
    found, wanted = tensors(here / made), tensors(here / "path_to_original_llama_hf_dir")
    assert found.keys() == wanted.keys() and all(torch.equal(found[key], wanted[key]) for key in wanted)


@pytest.mark.parametrize("before", [["cla:29"], ["cla:28", "cla:30"]])
def test_tokenizer_is_merged_from_local_folders(
    before: list[str], again: Callable[[str | list[str]], str], here: Path
) -> None:
    from sentencepiece import SentencePieceProcessor

    for name in before:
        again(name)
    new, old = (
        SentencePieceProcessor(model_file=str(here / folder / "tokenizer.model"))
        for folder in ("merged_tokenizer_hf", "path_to_original_llama_hf_dir")
    )
    assert new.get_piece_size() == 320 and new.encode(TEXT[1]) == old.encode(TEXT[1])
    assert len(new.encode(TEXT[0])) < len(old.encode(TEXT[0]))


@pytest.mark.parametrize(
    ("line", "adapters"),
    [("cla:35", ["chinese_llama_or_alpaca"]), ("cla:36", ["chinese_llama_plus", "chinese_alpaca_plus"])],
)
def test_adapters_with_a_larger_vocabulary_merge_and_generate(
    line: str, adapters: list[str], again: Callable[[str | list[str]], str], tongwen: Any, here: Path
) -> None:
    """As .pth, as a folder, and live on the base: one model."""
    again(line)
    assert tongwen("convert", "path_to_output_dir", "--to", "hf", "--out", "back")[0] == 0
    folders = [f"path_to_{name}_lora" for name in adapters]
    merging = ["python", "merge_llama_with_chinese_lora_low_mem.py", "--output_type", "huggingface", "--verbose"]
    merging += ["--base_model", "path_to_original_llama_hf_dir", "--lora_model", ",".join(folders)]
    again([*merging, "--output_dir", "path_to_merged_llama_or_alpaca_hf_dir"])
    found, wanted = tensors(here / "back"), tensors(here / "path_to_merged_llama_or_alpaca_hf_dir")
    assert found.keys() == wanted.keys() and all(torch.equal(found[key], wanted[key]) for key in wanted)
    assert wanted["lm_head.weight"].shape[0] == 320
    live = open_chat_model("path_to_original_llama_hf_dir", folders, "alpaca-cla", precision="fp32")
    merged = open_chat_model("path_to_merged_llama_or_alpaca_hf_dir", [], "alpaca-cla", precision="fp32")
    question = [{"role": "user", "content": "今天天气很好吗？"}]
    ids = live.prompt_ids(question)
    assert ids == merged.prompt_ids(question) and max(ids) >= 300, "the adapter's own tokenizer is used"
    with torch.no_grad():
        logits = [one.generator.model(torch.tensor([ids])).logits.float() for one in (live, merged)]
    assert torch.allclose(*logits, atol=1e-4)
    if line == "cla:35":
        assert again("cla:37").strip() and again("cla:38").strip()


def test_adapter_with_a_larger_vocabulary_continues_training(
    again: Callable[[str | list[str]], str], tongwen: Any, here: Path
) -> None:
    """On the original base, as the README has it: with the adapter's tokenizer and in its rows."""
    (here / "data").mkdir()
    (here / "data" / "a.json").write_text(json.dumps(dialogues(12)), encoding="utf-8")
    argv = ["python", "run_clm_sft_with_peft.py", "--model_name_or_path", "path_to_original_llama_hf_dir"]
    argv += ["--tokenizer_name_or_path", "chinese", "--dataset_dir", "data", "--max_seq_length", "512"]
    argv += ["--per_device_train_batch_size", "4", "--max_steps", "2", "--output_dir", "further"]
    again([*argv, "--peft_path", "path_to_chinese_llama_or_alpaca_lora"])
    old, new = (tensors(here / name) for name in ("path_to_chinese_llama_or_alpaca_lora", "further/sft"))
    embedding = "base_model.model.model.embed_tokens.weight"
    assert len(new[embedding]) == 320 and not torch.equal(new[embedding], old[embedding])
    assert max(open_chat_model("further/sft").prompt_ids([{"role": "user", "content": TEXT[0]}])) >= 300
    assert tongwen("merge", "--base", "path_to_original_llama_hf_dir", "--adapter", "further/sft", "--out", "m")[0] == 0


def test_adapter_without_its_embedding_rows_is_refused(tongwen: Any, here: Path) -> None:
    from safetensors.torch import load_file, save_file

    again_smaller = [
        "--adapter",
        "path_to_chinese_llama_plus_lora",
        "--adapter",
        "smaller",
        "--prompts",
        "p",
        "--out",
        "a",
    ]
    shutil.copytree("path_to_chinese_alpaca_plus_lora", "smaller")
    shutil.copytree("path_to_chinese_alpaca_plus_lora", "headless")
    file = here / "smaller" / "adapter_model.safetensors"
    state = load_file(file)
    whole = [name for name in state if "lora" not in name]
    save_file({name: value[:310].clone() if name in whole else value for name, value in state.items()}, file)
    save_file(
        {name: value for name, value in state.items() if "lm_head" not in name},
        here / "headless" / "adapter_model.safetensors",
    )
    (here / "p").write_text("你好\n", encoding="utf-8")
    base = ["generate", "--template", "alpaca-cla", "--model", "path_to_original_llama_hf_dir"]
    code, _, err = tongwen(*base, *again_smaller)
    assert code == 4 and "310 rows" in err and "320" in err and "never shrinks" in err and "smaller" in err
    code, _, err = tongwen(*base, "--adapter", "headless", "--prompts", "p", "--out", "a")
    assert code == 4 and "brings 320 rows" in err and "300" in err and "it lacks the head" in err


# -- what lines bring from elsewhere ----------------------------------------------------------------------------------


def test_download_commands_fetch_from_the_hub(again: Callable[[str | list[str]], str], server: Hub) -> None:
    server.repos["dataset", "BelleGroup/train_0.5M_CN"] = Repo({"Belle_open_source_0.5M.json": LINES})
    again("belle:4")
    for size in ("1M", "0.5M"):
        name = f"Belle_open_source_{size}"
        rows = [Path("data_dir", size, f"{name}.{part}.json").read_text().splitlines() for part in ("train", "dev")]
        assert len(rows[1]) == 2 and sorted(rows[0] + rows[1]) == sorted(LINES.decode().splitlines())
    for billions, name in ((7, "yahma/llama-7b-hf"), (13, "yahma/llama-13b-hf")):
        server.repos["model", name] = server.repos["model", MODEL]
        for line in [f"cla:{place}" for place in (range(1, 6) if billions == 7 else range(6, 10))]:
            again(line)
        assert Path(f"models/llama-{billions}b-hf/model.safetensors").read_bytes() == WEIGHTS
        assert len([one for one in server.requests_to(f"{name}/resolve") if "safetensors" in one["path"]]) == 1


def test_crawl_command_synthesizes_dialogues(
    faults: Callable[..., Any],
    tongwen: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-test")
    assert tongwen("migrate", "--out", "crawl.yaml", "--", *read_argv("mentioned:9"))[0] == 0
    code, _, err = tongwen("run", "crawl.yaml", f"synthesize.endpoint={faults().url}", "synthesize.concurrency=2")
    assert code == 0, err
    lines = Path("out/synthesize/dialogues.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 20 and all(json.loads(line)["messages"][1]["content"] for line in lines)
