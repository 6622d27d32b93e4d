"""Compare SmolLM2 in llama.cpp and transformers: token ids of real lines and greedy answers, with its old and a larger
vocabulary.

    python bench/gguf.py --model SMOLLM2_FOLDER --text zh_docs.txt --dialogues alpaca_zh.json --out bench/results/gguf.json

The grown model has new merges for the commonest Chinese characters and pairs, new rows set to the mean of the tokens they
replace, and a merged LoRA adapter with random weights. Each model is written as F32, F16 and Q8_0, loaded by `xllamacpp`, and
continues 20 prompts by 32 tokens. Where the tokens diverge, the gap of transformers' two best logits is recorded: a file of
lower precision may diverge only where the gap is small.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import subprocess
import sys
import tempfile
from collections import Counter
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.llamacpp import LlamaCpp

TOKENS, PROMPTS, LINES = 32, 20, 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--dialogues", type=Path, required=True)
    parser.add_argument("--types", nargs="+", default=["f32", "f16", "q8_0"])
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    lines = [line for line in args.text.read_text(encoding="utf-8").splitlines() if line.strip()]
    lines = lines[:: max(len(lines) // LINES, 1)][:LINES]
    questions = [row["instruction"] for row in json.loads(args.dialogues.read_text(encoding="utf-8"))][:PROMPTS]
    found: dict[str, Any] = {
        "machine": platform.platform(),
        "versions": {name: metadata.version(name) for name in ("torch", "transformers", "gguf", "xllamacpp")},
    }
    with tempfile.TemporaryDirectory() as folder:
        grown = grow(args.model, lines, Path(folder))
        for name, model in (("SmolLM2-135M-Instruct", args.model), ("grown and merged", grown)):
            found[name] = compare(model, Path(folder) / name, lines, questions, args.types)
            print(name, json.dumps(found[name]), flush=True)
    if args.out:
        args.out.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def tongwen(*arguments: object) -> None:
    subprocess.run([sys.executable, "-m", "tongwen", *map(str, arguments)], check=True, stdout=subprocess.DEVNULL)


def grow(model: Path, lines: list[str], folder: Path) -> Path:
    """Write a base with a larger vocabulary and an adapter; return the folder of the merged model."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    definition = json.loads(tokenizer.backend_tokenizer.to_str())
    vocabulary, merges = definition["model"]["vocab"], definition["model"]["merges"]
    text = "".join(character for line in lines for character in line if "\u4e00" <= character <= "\u9fff")
    common = [one for one, _ in Counter(text).most_common(300)]
    common += [pair for pair, _ in Counter(map("".join, itertools.pairwise(text))).most_common(300)]
    parts: dict[int, list[int]] = {}  # new id -> the two ids that it joins
    for piece in common:
        pieces = tokenizer.backend_tokenizer.encode(piece).tokens
        while len(pieces) > 1:
            left, right = pieces[:2]
            if left + right not in vocabulary:
                parts[len(vocabulary)] = [vocabulary[left], vocabulary[right]]
                vocabulary[left + right] = len(vocabulary)
                merges.append([left, right])
            pieces = [left + right, *pieces[2:]]
    base = folder / "base"
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    network.resize_token_embeddings(len(vocabulary), mean_resizing=False)
    with torch.no_grad():
        rows = network.get_input_embeddings().weight
        for index, pair in parts.items():
            rows[index] = rows[pair].mean(0)
    network.save_pretrained(base)
    tokenizer.save_pretrained(base)
    (base / "tokenizer.json").write_text(json.dumps(definition, ensure_ascii=False), encoding="utf-8")
    adapted = get_peft_model(
        network, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    torch.manual_seed(0)
    with torch.no_grad():
        for name, part in adapted.named_parameters():
            if "lora_B" in name:
                part.copy_(torch.randn_like(part) * 0.002)
    adapted.save_pretrained(folder / "adapter")
    tongwen("merge", "--base", base, "--adapter", folder / "adapter", "--out", folder / "merged")
    return folder / "merged"


def compare(model: Path, folder: Path, lines: list[str], questions: list[str], types: list[str]) -> dict[str, Any]:
    """Return per number type: lines with other ids, prompts whose tokens diverge, and the logit gaps there."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    turns = [[{"role": "user", "content": question}] for question in questions]
    prompts = [
        tokenizer(tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True))["input_ids"]
        for turn in turns
    ]
    expected = [answer(network, ids) for ids in prompts]
    found: dict[str, Any] = {"vocabulary": len(tokenizer), "lines": len(lines), "prompts": len(prompts)}
    for kind in types:
        out = folder / kind
        tongwen("convert", model, "--to", "gguf", "--quantize", kind, "--out", out)
        (file,) = out.glob("*.gguf")
        llama = LlamaCpp(file, context=1024, threads=1)
        other = sum(llama.encode(line) != tokenizer(line)["input_ids"] for line in lines)
        gaps = []
        for ids, (tokens, margins) in zip(prompts, expected, strict=True):
            generated = llama.greedy(ids, TOKENS)
            part = next((at for at, (one, two) in enumerate(zip(generated, tokens, strict=False)) if one != two), None)
            if part is None and len(generated) != len(tokens):
                part = min(len(generated), len(tokens))
            if part is not None:
                gaps.append(round(margins[min(part, len(margins) - 1)], 4))
        found[kind] = {"bytes": file.stat().st_size, "lines_with_other_ids": other, "prompts_that_part": len(gaps)}
        found[kind]["gaps_where_they_part"] = sorted(gaps)
        file.unlink()
    return found


def answer(network: Any, ids: list[int]) -> tuple[list[int], list[float]]:
    """Return (greedy tokens up to the end of the answer, gap of the two best logits at each)."""
    stops = network.generation_config.eos_token_id
    stops = stops if isinstance(stops, list) else [stops]
    tokens: list[int] = []
    margins: list[float] = []
    cache, step = None, torch.tensor([ids])
    with torch.no_grad():
        while len(tokens) < TOKENS:
            out = network(step, past_key_values=cache, use_cache=True)
            best = out.logits[0, -1].topk(2)
            margins.append(float(best.values[0] - best.values[1]))
            tokens.append(int(best.indices[0]))
            if tokens[-1] in stops:
                break
            cache, step = out.past_key_values, best.indices[:1][None]
    return tokens, margins


if __name__ == "__main__":
    main()
