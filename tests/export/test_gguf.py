"""GGUF export: llama.cpp and transformers give the same ids and the same greedy tokens."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from tests.adapters import make_adapter
from tests.conftest import CORPUS, byte_level_tokenizer, save_fast, sentencepiece_tokenizer, tensors, tiny_llama
from tests.export.gguf_models import check_greedy, check_refused, convert, make_model
from tongwen.core import model_families
from tongwen.core.errors import MissingPackage, ModelError
from tongwen.export import kquants
from tongwen.export.gguf import check_type
from tongwen.export.kquants import QuantizationMix
from tongwen.model.loading.locate import locate

gguf = pytest.importorskip("gguf")
LINES = [
    *dict.fromkeys(CORPUS),
    "第1章：2024年，a  b\tc\n\n它's 3.14%！",
    "don't STOP  12345",
    " lead",
    "🙂 émoji",
    "中文English混排",
    "\n\n\n是  的   <unused7> HelloWorld",
]


def make_tokenizer(folder: Path, kind: str) -> Any:
    if kind == "byte level":
        return byte_level_tokenizer(folder)
    if kind in model_families.PATTERNS:
        return cutting_tokenizer(folder, model_families.PATTERNS[kind])
    tokenizer = sentencepiece_tokenizer(folder, legacy="legacy" in kind or kind == "phi-3")
    backend = tokenizer.backend_tokenizer
    if kind == "gemma":  # no blank before a text; runs of blanks are merged, and defined by a user as well
        state = json.loads(backend.to_str())
        state["model"]["vocab"]["\u2581\u2581"] = len(state["model"]["vocab"])
        state["model"]["merges"].append(["\u2581", "\u2581"])
        backend = Tokenizer.from_str(json.dumps(state))
        backend.pre_tokenizer, backend.normalizer = None, normalizers.Replace(" ", "\u2581")
        backend.add_tokens([AddedToken(text, normalized=False) for text in ("\n\n", "\u2581\u2581", "<unused7>")])
        return save_fast(backend, folder, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    if kind == "phi-3":  # drops blanks behind special tokens, but for three of them
        backend.add_special_tokens([AddedToken("</s>", rstrip=True, normalized=False)])
        for name, drops in (("<|endoftext|>", False), ("<|user|>", True), ("<|end|>", True)):
            backend.add_special_tokens([AddedToken(name, rstrip=drops, normalized=False)])
    tokenizer.save_pretrained(folder)
    return tokenizer


def cutting_tokenizer(folder: Path, patterns: tuple[str, ...]) -> Any:
    """Byte-level BPE whose merges reach over everything, so that only the patterns keep pieces apart."""
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer, backend.decoder = level, decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        LINES * 4, trainers.BpeTrainer(vocab_size=700, initial_alphabet=alphabet, show_progress=False)
    )
    splits = [pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in patterns]
    backend.pre_tokenizer = pre_tokenizers.Sequence([*splits, level])
    return save_fast(backend, folder, eos_token="!")


ROPE_SCALING = {
    "llama3": {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0}
    | {"high_freq_factor": 4.0, "original_max_position_embeddings": 32},
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    "yarn": {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64},
    "longrope": {"rope_type": "longrope", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
    | {"short_factor": [1.0, 1.1, 1.3, 1.6], "long_factor": [1.0, 2.0, 4.0, 8.0]},
    "by layer": {
        "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
    },
}
ROPE_SCALING["deepseek"] = ROPE_SCALING["yarn"] | {
    "mscale": 0.707,
    "mscale_all_dim": 0.707,
    "beta_fast": 32,
    "beta_slow": 1,
}


MADE_WITH = {"qwen3_5_text": "qwen35", "ministral3": "tekken", "seed_oss": "seed-coder", "smollm3": "minicpm5"}


@pytest.mark.sample(
    "gemma-gemma-more3",
    "deepseek_v3-deepseek-v3-more0",
    "llama-sentencepiece-more10",
)
@pytest.mark.parametrize(
    ("family", "kind", "more"),
    [
        ("deepseek_v3", "deepseek-v3", {}),
        ("phi3", "gpt-4o", {}),
        ("phi3", "phi-3", {}),
        ("gemma", "gemma", {}),
        *(("qwen3", pattern, {}) for pattern in ("qwen2", "llama-bpe")),
        *((family, pattern, {}) for family, pattern in MADE_WITH.items()),
        ("llama", "sentencepiece", {}),
        ("llama", "sentencepiece, legacy", {"attention_bias": True}),
        ("llama", "byte level", {"rope_parameters": ROPE_SCALING["llama3"]}),
        ("qwen3", "byte level", {"rope_parameters": ROPE_SCALING["linear"]}),
        ("qwen3", "byte level", {"rope_parameters": ROPE_SCALING["yarn"]}),
        ("qwen2", "byte level", {"tie_word_embeddings": True}),
        ("gpt_neox", "byte level", {"use_parallel_residual": False}),
        ("gemma3_text", "byte level", {"rope_parameters": ROPE_SCALING["by layer"], "final_logit_softcapping": 5.0}),
        ("phi3", "byte level", {"rope_parameters": ROPE_SCALING["longrope"], "original_max_position_embeddings": 1024}),
        ("phi3", "byte level", {"rope_parameters": ROPE_SCALING["longrope"], "original_max_position_embeddings": 8}),
        ("deepseek_v3", "byte level", {"q_lora_rank": None, "routed_scaling_factor": 1.0}),
        ("deepseek_v3", "byte level", {"rope_parameters": ROPE_SCALING["deepseek"], "norm_topk_prob": False}),
    ],
)
def test_llama_cpp_gives_the_same_ids_and_tokens(
    family: str, kind: str, more: dict[str, Any], tmp_path: Path, tongwen: Any
) -> None:
    pytest.importorskip("xllamacpp")
    from tests.llamacpp import LlamaCpp

    folder = tmp_path / "model"
    tokenizer = make_tokenizer(folder, kind)
    model = make_model(folder, family, len(tokenizer) + 3, **more)  # rows that no token owns
    there = LlamaCpp(convert(tongwen, folder, tmp_path / "gguf", "f32"))
    for line in [*LINES, *(["<|user|>\n 你好<|end|>\n是  的</s> 好<|endoftext|> 好"] if kind == "phi-3" else ())]:
        if kind == "sentencepiece" and line[0] == " ":
            continue  # transformers puts no second blank before it, SentencePiece and llama.cpp do
        assert there.encode(line) == tokenizer(line)["input_ids"], line
    for line in LINES[:3]:
        check_greedy(there, model, tokenizer(line)["input_ids"][:40], 24)


def test_a_vocabulary_whose_ids_are_no_numbers_is_refused(tmp_path: Path) -> None:
    from tongwen.export.gguf_vocab import read_vocabulary

    make_tokenizer(tmp_path, "byte level")
    definition = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    definition["model"]["vocab"] |= {"M": {"chosen": 455}}
    (tmp_path / "tokenizer.json").write_text(json.dumps(definition), encoding="utf-8")
    with pytest.raises(ModelError, match="not a tokenizer"):
        read_vocabulary(tmp_path, 400)


def test_pretokenizer_pattern_is_recognised(tmp_path: Path) -> None:
    from tongwen.core.errors import ModelError
    from tongwen.core.model_families import PATTERNS
    from tongwen.export.gguf_vocab import read_vocabulary

    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    own = pre_tokenizers.ByteLevel(add_prefix_space=False)
    cuts = {"gpt-2": own, "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), own])}
    for name, patterns in PATTERNS.items():
        splits = [pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in patterns]
        cuts[name] = pre_tokenizers.Sequence([*splits, level])
    for name, cut in cuts.items():
        tokenizer = byte_level_tokenizer(tmp_path)
        tokenizer.backend_tokenizer.pre_tokenizer = cut
        tokenizer.add_tokens(["人工智能"])
        tokenizer.save_pretrained(tmp_path)
        found = read_vocabulary(tmp_path, len(tokenizer))
        assert found.pre == name and found.tokens[-1] == "人工智能"
    strange = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(r"\w+"), behavior="isolated"), level])
    tokenizer.backend_tokenizer.pre_tokenizer = strange
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="no code for this tokenizer"):
        read_vocabulary(tmp_path, len(tokenizer))


@pytest.mark.parametrize("kind", ["f16", "bf16", "q8_0", "q4_0", "q4_1", "q5_0", "q5_1"])
def test_quantization_error_is_within_bounds(kind: str, tmp_path: Path, tongwen: Any) -> None:
    folder = tmp_path / "model"
    tokenizer = byte_level_tokenizer(folder)
    make_model(folder, "qwen3", len(tokenizer))
    source = tensors(folder)
    reader = gguf.GGUFReader(str(convert(tongwen, folder, tmp_path / "out", kind)))
    allowed = {"f16": 1e-3, "bf16": 8e-3, "q8_0": 1e-2, "q4_0": 0.14, "q4_1": 0.1, "q5_0": 0.07, "q5_1": 0.05}[kind]
    held = {tensor.name: tensor for tensor in reader.tensors}
    assert len(held) == len(source)
    expected = source["model.layers.1.mlp.up_proj.weight"].numpy()
    found = held["blk.1.ffn_up.weight"]
    back = gguf.quants.dequantize(found.data, found.tensor_type)
    assert np.abs(back - expected).max() <= allowed * np.abs(expected).max()
    assert held["output_norm.weight"].tensor_type.name == "F32"
    assert (held["token_embd.weight"].tensor_type.name == "Q8_0") is (kind.startswith("q"))
    assert bytes(reader.fields["tokenizer.ggml.tokens"].parts[-1]).decode() == reader_token(
        tokenizer, len(tokenizer) - 1
    )


def reader_token(tokenizer: Any, index: int) -> str:
    return str(tokenizer.convert_ids_to_tokens(index))


def test_template_and_stop_tokens_are_exported(chat_model: Path, tmp_path: Path, tongwen: Any) -> None:
    from transformers import AutoTokenizer

    from tongwen.model.loading.chat_setup import bind_template

    folder = tmp_path / "model"
    tokenizer = AutoTokenizer.from_pretrained(chat_model)
    tokenizer.chat_template = bind_template("chatml", tokenizer, []).source
    tokenizer.save_pretrained(folder)
    tiny_llama(folder, len(tokenizer))
    file = convert(tongwen, folder, tmp_path / "out", "f16")
    fields = gguf.GGUFReader(str(file)).fields
    assert fields["tokenizer.chat_template"].contents() == tokenizer.chat_template
    assert fields["tokenizer.ggml.eos_token_id"].contents() == tokenizer.convert_tokens_to_ids("<|im_end|>")
    text = (tmp_path / "out" / "Modelfile").read_text(encoding="utf-8")
    assert text.startswith(f"FROM ./{file.name}\n") and 'PARAMETER stop "<|im_end|>"' in text
    expected_template = "<|im_start|>user\n{{ .Prompt }}<|im_end|>\n<|im_start|>assistant\n{{ end }}{{ .Response }}"
    assert expected_template in text and "{{ if .System }}<|im_start|>system\n{{ .System }}<|im_end|>" in text


def test_unsupported_model_or_type_is_refused(tmp_path: Path, tongwen: Any) -> None:
    make_model(tmp_path / "opt", "opt", 64)
    argv = ("convert", tmp_path / "opt", "--to", "gguf", "--out", tmp_path / "out")
    code, _, err = tongwen(*argv)
    assert code == 4 and "'opt'" in err and f"convert_hf_to_gguf.py {tmp_path / 'opt'}" in err
    code, _, err = tongwen(*argv, "--quantize", "q3")
    assert code == 4 and "q5_1" in err
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize("kind", ["q2_k", "q3_k_m", "q4_k_s", "q4_k_m", "q5_k_m", "q6_k"])
def test_k_quants_use_the_llama_cpp_library(kind: str, tmp_path: Path, tongwen: Any) -> None:
    pytest.importorskip("xllamacpp")
    from tests.llamacpp import LlamaCpp

    folder = tmp_path / "model"
    tokenizer = byte_level_tokenizer(folder)
    tiny_llama(folder, len(tokenizer), hidden_size=256, intermediate_size=320, num_hidden_layers=8)
    source = tensors(folder)
    file = convert(tongwen, folder, tmp_path / "out", kind)
    reader = gguf.GGUFReader(str(file))
    held = {tensor.name: tensor for tensor in reader.tensors}
    assert reader.fields["general.file_type"].contents() == gguf.LlamaFileType[f"MOSTLY_{kind.upper()}"]
    allowed = {"q2_k": 0.4, "q3_k_m": 0.2, "q4_k_s": 0.1, "q4_k_m": 0.1, "q5_k_m": 0.05, "q6_k": 0.03}[kind]
    for ours, theirs in (("self_attn.v_proj", "attn_v"), ("mlp.up_proj", "ffn_up"), ("mlp.down_proj", "ffn_down")):
        found, expected = held[f"blk.7.{theirs}.weight"], source[f"model.layers.7.{ours}.weight"].numpy()
        back = gguf.quants.dequantize(found.data, found.tensor_type)
        assert np.abs(back - expected).max() <= allowed * np.abs(expected).max()
    assert held["token_embd.weight"].tensor_type.name == "Q6_K"  # the head too
    assert held["blk.7.ffn_up.weight"].tensor_type.name == f"{kind[:4].upper()}"
    assert held["blk.7.ffn_down.weight"].tensor_type.name in ("Q4_0", "Q5_0", "Q5_1", "Q8_0")  # rows of 320
    assert len(LlamaCpp(file, threads=1).greedy([1, 5, 9], 4)) == 4


def test_quantization_mixes_match_llama_cpp() -> None:
    """What the rules of llama-quant.cpp come to for 32 layers, written down by hand."""
    mixture = QuantizationMix("q4_k_m", 32, groups=4, tied=False)
    more = [layer for layer in range(32) if mixture.type_of(f"blk.{layer}.ffn_down.weight", 14336) == "Q6_K"]
    assert more == [0, 1, 2, 3, 6, 9, 12, 15, 18, 21, 24, 27, 28, 29, 30, 31]
    assert more == [layer for layer in range(32) if mixture.type_of(f"blk.{layer}.attn_v.weight", 4096) == "Q6_K"]
    assert mixture.type_of("token_embd.weight", 4096) == "Q4_K" and mixture.type_of("output.weight", 4096) == "Q6_K"
    assert QuantizationMix("q4_k_m", 30, groups=3, tied=True).type_of("token_embd.weight", 576) == "Q8_0"
    assert QuantizationMix("q2_k", 32, groups=8, tied=False).type_of("blk.0.attn_v.weight", 4096) == "Q4_K"
    assert QuantizationMix("q3_k_l", 32, groups=8, tied=False).type_of("blk.0.attn_output.weight", 100) == "F16"


def test_k_quants_without_library_name_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kquants._function.cache_clear()
    monkeypatch.setattr(kquants, "_libraries", lambda: iter([tmp_path / "none.so"]))
    with pytest.raises(MissingPackage, match=re.escape("tongwen[llamacpp]")):
        check_type("q4_k_m")
    kquants._function.cache_clear()


def test_merged_tied_model_exports_to_gguf(chat_model: Path, tmp_path: Path, tongwen: Any) -> None:
    pytest.importorskip("xllamacpp")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from tests.llamacpp import LlamaCpp

    make_adapter(chat_model, tmp_path / "adapter")
    argv = ("merge", "--base", chat_model, "--adapter", tmp_path / "adapter", "--out", tmp_path / "merged")
    assert tongwen(*argv)[0] == 0
    file = convert(tongwen, tmp_path / "merged", tmp_path / "gguf", "f32")
    model, tokenizer = (kind.from_pretrained(tmp_path / "merged") for kind in (AutoModelForCausalLM, AutoTokenizer))
    ids = tokenizer("今天天气很好")["input_ids"]
    check_greedy(LlamaCpp(file), model, ids, 16)
    manifest = json.loads((tmp_path / "gguf" / "manifest.json").read_text())
    assert manifest["kind"] == "gguf" and file.name in manifest["files"]
    assert tongwen("verify", tmp_path / "gguf")[0] == 0


def test_adapter_merges_onto_a_gguf_base(chat_model: Path, tmp_path: Path, tongwen: Any) -> None:
    make_adapter(chat_model, tmp_path / "adapter")
    file = convert(tongwen, chat_model, tmp_path / "gguf", "f32")
    for name, base in (("one", chat_model), ("other", file)):
        argv = ("merge", "--base", base, "--adapter", tmp_path / "adapter", "--out", tmp_path / name)
        code, text, err = tongwen(*argv)
        assert code == 0, err
    assert "de-quantising" in text
    one, other = tensors(tmp_path / "one"), tensors(tmp_path / "other")
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    assert (tmp_path / "other" / "tokenizer.json").is_file()


def test_recipe_exports_all_formats(chat_model: Path, tmp_path: Path, tongwen: Any) -> None:
    from tests.conftest import write_recipe

    recipe = write_recipe(
        tmp_path, chat_model, sft=", stop_after: 1 steps", extra="export: {formats: [hf, pth, gguf], quantize: q8_0}\n"
    )
    code, _, err = tongwen("run", recipe)
    assert code == 0, err
    export = tmp_path / "out" / "export"
    assert tensors(export / "hf").keys() == tensors(tmp_path / "out" / "merge").keys()
    assert (export / "pth" / "consolidated.00.pth").is_file()
    card = (export / "hf" / "README.md").read_text(encoding="utf-8")
    report = json.loads((tmp_path / "out" / "sft" / "report.json").read_text())["held_out"]["bits_per_byte"]
    for fact in ("# tiny", "| sft | lora, rank 4", "24 rows read", f"{report['after']:.3f}", "Not recorded"):
        assert fact in card
    (file,) = (export / "gguf").glob("*.gguf")
    assert file.name == "tiny-q8_0.gguf"
    assert sorted(json.loads((export / "manifest.json").read_text())["gguf"]["files"]) == sorted(
        [file.name, "Modelfile"]
    )
    code, text, _ = tongwen("run", recipe)
    assert code == 0 and "export: already done" in text
    recipe.write_text(recipe.read_text().replace("merge: {}\n", ""))
    code, _, err = tongwen("check", recipe)
    assert code == 2 and "an adapter alone is not a model" in err


@pytest.mark.parametrize("name", ["gpt-2", "smollm", "qwen2", "llama-bpe", "gpt-4o", "deepseek-v3"])
def test_gguf_base_uses_its_pretokenizer(name: str, tmp_path: Path, tongwen: Any) -> None:
    """transformers reads every byte-level GGUF tokenizer as GPT-2's: numbers and contractions would get other ids."""
    from tongwen.core.model_families import PATTERNS
    from tongwen.model.loading.locate import locate
    from tongwen.model.loading.tokenizer import load_tokenizer

    folder = tmp_path / "model"
    tokenizer = byte_level_tokenizer(folder)
    own, backend = pre_tokenizers.ByteLevel(add_prefix_space=False), tokenizer.backend_tokenizer
    if name == "smollm":
        backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), own])
    elif name in PATTERNS:
        level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        splits = [pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in PATTERNS[name]]
        backend.pre_tokenizer = pre_tokenizers.Sequence([*splits, level])
    else:
        backend.pre_tokenizer = own
    tokenizer.save_pretrained(folder)
    tiny_llama(folder, len(tokenizer))
    file = convert(tongwen, folder, tmp_path / "out", "f16")
    again = load_tokenizer(locate(str(file)))
    cut = again.backend_tokenizer.pre_tokenizer.pre_tokenize_str
    for line in [*LINES, "12345 DON'T 中文，我们2024"]:
        assert cut(line) == backend.pre_tokenizer.pre_tokenize_str(line), line
        assert again(line)["input_ids"] == tokenizer(line)["input_ids"], line


def damaged(sound: bytes, number: int) -> bytes:
    """One of many ways to spoil a header: cuts, counts of 2^40, single flipped bits."""
    header = gguf_header_size(sound)
    if number < 6:
        return sound[: header * number // 6]
    if number < 8:
        return sound[: 8 * number - 40] + (1 << 40).to_bytes(8, "little") + sound[8 * number - 32 :]
    spot = np.random.default_rng(number).integers(header)
    return sound[:spot] + bytes([sound[spot] ^ 1 << number % 8]) + sound[spot + 1 :]


def gguf_header_size(sound: bytes) -> int:
    """Where the data begin: behind the name of the last tensor and its other fields."""
    return sound.rindex(b"output_norm.weight") + 64


def test_damaged_header_is_refused_in_time(chat_model: Path, tmp_path: Path, tongwen: Any) -> None:
    """Told at once, or read to the end: a flip inside a name or a number of the vocabulary shows in the digest alone."""
    folder = convert(tongwen, chat_model, tmp_path / "out", "f32").parent
    file = next(folder.glob("*.gguf"))
    sound, refused = file.read_bytes(), 0
    for number in range(208):
        file.write_bytes(damaged(sound, number))
        code, _, err = tongwen("verify", folder)
        assert code == 4, f"{number}: {err}"
        try:
            locate(str(file))
        except ModelError as error:
            refused += 1
            assert "is corrupt" in str(error)
        else:
            assert number >= 8
    assert refused > 20
    file.write_bytes(damaged(sound, 7))
    began = time.monotonic()
    code, _, err = tongwen("merge", "--base", file, "--adapter", tmp_path, "--out", tmp_path / "no")
    assert code == 4 and "count of 1099511627776" in err and time.monotonic() - began < 10


@pytest.mark.sample()
def test_adapter_to_gguf_script(chat_model: Path, tmp_path: Path) -> None:
    make_adapter(chat_model, tmp_path / "adapter")
    script = Path(__file__).parents[2] / "examples" / "adapter_to_gguf.sh"
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", str(script), str(chat_model), str(tmp_path / "adapter"), str(tmp_path / "out")],
        capture_output=True,
        text=True,
        env={**os.environ, "PATH": path},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    file = next(word for word in done.stdout.split() if word.endswith(".gguf"))
    assert gguf.GGUFReader(file).fields["general.architecture"].contents() == "llama"


@pytest.mark.parametrize("command", ["check", "plan", "run"])
def test_run_that_cannot_export_is_refused_before_training(command: str, tmp_path: Path, tongwen: Any) -> None:
    from tests.conftest import write_recipe

    folder = tmp_path / "model"
    make_model(folder, "opt", len(byte_level_tokenizer(folder)))
    recipe = write_recipe(tmp_path, folder, extra="export: {formats: [hf, gguf]}\n")
    code, _, err = tongwen(command, recipe)
    assert code == 4 and "'opt'" in err and f"convert_hf_to_gguf.py {tmp_path / 'out'}/merge" in err
    assert not (tmp_path / "out" / "prepare").exists()
    code, _, err = tongwen(command, recipe, "export.quantize=q3")
    assert code == 4 and "q5_1" in err
    if command != "check":
        strange, split = tmp_path / "strange", pre_tokenizers.Split(Regex(r"\w+"), behavior="isolated")
        tokenizer = byte_level_tokenizer(strange)
        tokenizer.backend_tokenizer.pre_tokenizer = split
        tokenizer.save_pretrained(strange)
        tiny_llama(strange, len(tokenizer))
        code, _, err = tongwen(command, recipe, f"base={strange}")
        assert code == 4 and "no code for this tokenizer" in err
    if command == "run":  # what was asked for stops before it
        assert tongwen(command, recipe, "--until", "prepare")[0] == 0
    else:
        assert tongwen(command, recipe, "export.formats=[hf]")[0] == 0


CONFIGS_LLAMACPP_CANNOT_RUN = [  # what llama.cpp fixes for a family, said otherwise by a config
    ("qwen3_moe", {"norm_topk_prob": False}, "norm_topk_prob: false"),
    ("gpt_neox", {"attention_bias": False}, "attention_bias: false"),
    ("gemma", {"tie_word_embeddings": False}, "tie_word_embeddings: false"),
    ("gemma2", {"query_pre_attn_scalar": 144}, "query_pre_attn_scalar: 144"),
    ("gemma2", {"attn_logit_softcapping": None}, "attn_logit_softcapping: null"),
    ("gemma2", {"layer_types": ["full_attention"] * 4}, "layer_types"),
    ("gemma3_text", {"use_bidirectional_attention": True}, "use_bidirectional_attention: true"),
    ("smollm3", {"no_rope_layer_interval": 2}, "no_rope_layers"),
    ("smollm3", {"rope_parameters": ROPE_SCALING["llama3"]}, "'llama3'"),
    ("deepseek_v3", {"rope_parameters": ROPE_SCALING["yarn"]}, "mscale: None"),
    ("deepseek_v3", {"num_hidden_layers": 26}, "q_lora_rank: 32"),
    ("deepseek_v3", {"rope_parameters": ROPE_SCALING["linear"]}, "'linear'"),
    ("deepseek_v3", {"rope_parameters": ROPE_SCALING["deepseek"] | {"beta_fast": 16}}, "beta_fast: 16"),
    ("deepseek_v3", {"rope_interleave": False}, "rope_interleave: false"),
]


@pytest.mark.parametrize(("family", "more", "message"), CONFIGS_LLAMACPP_CANNOT_RUN)
def test_config_that_llama_cpp_computes_differently_is_refused(
    family: str, more: dict[str, Any], message: str, tmp_path: Path, tongwen: Any
) -> None:
    check_refused(tmp_path, family, more, message, tongwen)


def test_unsupported_sliding_window_limits_the_context(tmp_path: Path, tongwen: Any) -> None:
    folder = tmp_path / "model"
    make_model(folder, "phi3", len(byte_level_tokenizer(folder)), sliding_window=100)
    fields = gguf.GGUFReader(str(convert(tongwen, folder, tmp_path / "out", "f16"))).fields
    assert fields["phi3.context_length"].contents() == 100


def test_tied_head_and_mtp_layers_are_not_exported(tmp_path: Path, tongwen: Any) -> None:
    """transformers reads neither: the file must not hold what the model does not compute with."""
    from safetensors.torch import save_file

    folder = tmp_path / "model"
    rows = len(byte_level_tokenizer(folder))
    make_model(folder, "deepseek_v3", rows, tie_word_embeddings=True)
    held = tensors(folder)
    assert "lm_head.weight" not in held
    ahead = {name.replace("layers.2.", "layers.3."): part.clone() for name, part in held.items() if "layers.2." in name}
    save_file({**held, **ahead, "lm_head.weight": torch.ones(rows, 64)}, folder / "model.safetensors")
    file = convert(tongwen, folder, tmp_path / "out", "q8_0")
    there = {tensor.name: tensor for tensor in gguf.GGUFReader(str(file)).tensors}
    assert "output.weight" not in there and not any(name.startswith("blk.3.") for name in there)
    assert there["blk.2.ffn_gate_inp.weight"].tensor_type.name == "F32"  # it chooses
    assert there["blk.2.attn_k_b.weight"].shape.tolist() == [16, 16, 4]
