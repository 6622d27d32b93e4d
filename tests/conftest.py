"""Build tiny models and tokenizers in a second, without network or downloads."""

from __future__ import annotations

import builtins
import json
import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ["TONGWEN_LANG"] = "en"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["COLUMNS"] = "200"

import os

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from tongwen.cli.main import main

pytest_plugins = (  # fixtures that several folders share
    "tests.data.synthesis.endpoint_faults",
    "tests.hub.hub_server",
    "tests.model.chatglm.chatglm_base",
)

torch.set_num_threads(1)  # so that a test may fork
# The first use of torch's pool after a fork replaces it, and the threads of a loader may race to do so.
os.register_at_fork(after_in_child=lambda: torch.set_num_threads(1))

CORPUS = [
    "你好，世界。我是一个中文助手。今天天气很好，我们去公园散步吧。",
    "人工智能可以帮助我们学习语言。月亮自己不会发光，它反射太阳的光。",
    "The quick brown fox jumps over the lazy dog. Hello world, how are you today?",
    "是的，没错。否，不对。一加一等于二，二加二等于四。",
] * 4
SHARED = Path(os.environ.get("TONGWEN_SHARED") or "nowhere")  # real data and tokenizers, for the tests that have them
CHATML_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


def save_fast(backend: Tokenizer, folder: Path, **special: str) -> Any:
    """A tokenizers-library tokenizer as a transformers folder."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **special)
    tokenizer.save_pretrained(str(folder))
    return tokenizer


def byte_level_tokenizer(folder: Path) -> Any:
    """Byte-level BPE with ChatML's tokens; pad = eos, as Qwen and SmolLM2 have it."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=list(CHATML_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    return save_fast(backend, folder, eos_token="<|im_end|>", pad_token="<|im_end|>", bos_token="<|im_start|>")


def sentencepiece_tokenizer(folder: Path, legacy: bool = False) -> Any:
    """LLaMA's kind: a dummy prefix space before every text, byte fallback, and `<s>` prepended by the tokenizer."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581"]
    pieces += sorted({character for text in CORPUS for character in text if character != " "})
    merges = [("\u2581", "是"), ("\u2581", "H"), ("你", "好"), ("\u2581", "你好"), ("世", "界")]
    pieces += ["".join(pair) for pair in merges]
    backend = Tokenizer(
        models.BPE(
            vocab={piece: index for index, piece in enumerate(pieces)},
            merges=merges,
            unk_token="<unk>",
            byte_fallback=True,
            fuse_unk=True,
        )
    )
    if legacy:
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in ("<unk>", "<s>", "</s>")]
    )
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    return save_fast(backend, folder, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def tiny_llama(folder: Path, vocabulary: int, seed: int = 0, **config: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    shape = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
    } | config
    model = LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, **shape))
    model.save_pretrained(str(folder))
    return model


def tiny_moe(**config: Any) -> Any:
    """A Qwen3 with four fused experts."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    shape: dict[str, Any] = {
        "vocab_size": 60,
        "hidden_size": 16,
        "intermediate_size": 16,
        "moe_intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "num_experts": 4,
        "num_experts_per_tok": 2,
    } | config
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**shape))


@pytest.fixture(scope="session")
def chat_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with a byte-level tokenizer and tied embeddings."""
    folder = tmp_path_factory.mktemp("chat_model")
    tokenizer = byte_level_tokenizer(folder)
    tiny_llama(folder, len(tokenizer))
    return folder


@pytest.fixture(scope="session")
def other_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same shape and tokenizer, other weights."""
    folder = tmp_path_factory.mktemp("other_model")
    tokenizer = byte_level_tokenizer(folder)
    tiny_llama(folder, len(tokenizer), seed=1)
    return folder


def write_rows(file: Path, rows: list[Any]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return file


def dialogues(count: int) -> list[dict[str, str]]:
    """Alpaca rows of different lengths."""
    return [
        {
            "instruction": f"问题{index}：你好吗？",
            "input": "",
            "output": "今天天气很好。" * (1 + index % 5) + str(index),
        }
        for index in range(count)
    ]


def write_recipe(
    folder: Path,
    base: Path,
    rows: list[Any] | None = None,
    sft: str = "",
    extra: str = "",
    merge: bool = True,
    samples: int = 0,
) -> Path:
    """A recipe for a tiny run. samples: answers of 64 tokens before and after it; they cost more than its training."""
    data = write_rows(folder / "data.jsonl", dialogues(24) if rows is None else rows)
    text = f"name: tiny\nbase: {base}\nout: {folder / 'out'}\nprepare: {{dialogues: {data}, held_out: 4}}\n"
    text += f"sft: {{template: chatml, adapter: {{rank: 4}}, max_length: 256, batch_size: 4, learning_rate: 1e-2, samples: {samples}, precision: fp32{sft}}}\n"
    text += ("merge: {}\n" if merge else "") + extra
    recipe = folder / "recipe.yaml"
    recipe.write_text(text, encoding="utf-8")
    return recipe


def type_lines(lines: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Simulate a user who types these lines at the terminal and leaves."""
    waiting = iter(lines)

    def read(prompt: str = "") -> str:
        try:
            return next(waiting)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr(builtins, "input", read)


def remade(base: Path, folder: Path, weights: dict[str, torch.Tensor], **config_changes: Any) -> Path:
    """Copy a model, replacing these weights and settings of its configuration."""
    from safetensors.torch import save_file

    shutil.copytree(base, folder)
    save_file(tensors(base) | weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((base / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **config_changes}))
    return folder


def without_chatml(base: Path, folder: Path) -> Path:
    """Copy a model with zero rows for ChatML's tokens, as if never trained on them."""
    rows = tensors(base)["model.embed_tokens.weight"]
    rows[1:3] = 0
    return remade(base, folder, {"model.embed_tokens.weight": rows})


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of the safetensors files in a folder."""
    from safetensors.torch import load_file

    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--all", action="store_true", help="run every case of the tests that are marked with `sample`, too"
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Of a test with `@pytest.mark.sample(*ids)` keep these cases, unless --all or a single test is asked for."""
    if config.getoption("--all") or any("::" in argument for argument in config.args):
        return
    left_out = [item for item in items if not _is_in_sample(item)]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in set(left_out)]


def _is_in_sample(item: pytest.Item) -> bool:
    mark = item.get_closest_marker("sample")
    return mark is None or item.name.partition("[")[2].removesuffix("]") in mark.args


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: Any) -> Any:
    return require_packages((yield))


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Any:
    return require_packages((yield))


def require_packages(report: Any) -> Any:
    """Turn a skip for a missing package into a failure, unless TONGWEN_MAY_LACK lists it (.ci/run sets that)."""
    if report.skipped and (may_lack := os.environ.get("TONGWEN_MAY_LACK")) is not None:
        reason = str(report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr)
        lacks = re.search(r"could not import '(\w+)|Skipped: (\w+) is not installed", reason)
        if lacks and (lacks[1] or lacks[2]) not in may_lack.split():
            report.outcome, report.longrepr = "failed", reason
    return report


@pytest.fixture(autouse=True)
def _plain_screen() -> Any:
    """Restore the console: a command with --json changes it for the whole process."""
    yield
    from rich.console import Console

    from tongwen.core import console

    console.SCREEN.json, console.SCREEN.console = False, Console(highlight=False, width=200)


@pytest.fixture()
def tongwen(capsys: pytest.CaptureFixture[str]) -> Any:
    """Run a command in this process: (exit code, stdout, stderr)."""

    def call(*arguments: object) -> tuple[int, str, str]:
        from rich.console import Console

        from tongwen.core import console

        console.SCREEN.json = False
        console.SCREEN.console = Console(highlight=False, width=200)
        code = main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return code, out, err

    return call


def manifest(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "manifest.json").read_text()))
