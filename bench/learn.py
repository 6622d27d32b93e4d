"""What continued pre-training teaches and what it costs the base: arms at equal CPU-seconds, several seeds.

    python bench/learn.py --model SMOLLM2_FOLDER --text zh_docs.txt --english en_wiki.txt --out bench/results/learn.json

Each arm is a change of one recipe. Everything that an arm does counts towards its seconds: calibration, own answers, scoring.
An arm is three numbers, measured by plain transformers in fp32: x, Chinese bits per byte, held out; y, English bits per byte,
held out; z, mean KL(base || model) in nats per token on the base's own greedy answers to the 200 prompts of prompts_en.txt,
with the share of tokens on which both agree. These prompts are never used by the product.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from cpt_cpu import cpu_of_children, documents, metrics, tongwen
from sft_cpu import processor
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

RECIPE = """\
name: bench
base: {model}
out: {out}
seed: {seed}
prepare: {{documents: [{{path: {text}, language: zh, records: paragraph}}], held_out: 0.01}}
pretrain:
  train: full
  max_length: 512
  batch_tokens: 1024
  schedule: wsd
  decay: 0.5
  stop_after: 3 steps
  precision: {precision}
  save_every: 1000000
  samples: 0
"""
# name: changes of the recipe's section
ARMS = {
    "7e-5": ["learning_rate=7e-5"],
    "1.5e-4": ["learning_rate=1.5e-4"],
    "3e-4": ["learning_rate=3e-4"],
    "1.5e-4, keep 0.5": ["learning_rate=1.5e-4", "keep=0.5"],
    "1.5e-4, keep 0.75": ["learning_rate=1.5e-4", "keep=0.75"],
    "lora 1.3e-3": ["train=lora", "learning_rate=1.3e-3"],
    "lora 1.3e-3, keep 0.75": ["train=lora", "learning_rate=1.3e-3", "keep=0.75"],
}
PROMPTS = Path(__file__).parent / "prompts_en.txt"
ANSWER, TEXT, TEXTS = 64, 512, 60  # tokens of an answer; tokens of a text at most; held-out texts of each language


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--text", required=True)
    parser.add_argument("--english", required=True)
    parser.add_argument("--seconds", type=float, default=600, help="CPU-seconds of each arm")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--arms", nargs="*", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="bf16")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    result: dict[str, Any] = {
        "machine": {"processor": processor(), "cpus": os.cpu_count(), "python": platform.python_version()},
        "commit": commit.stdout.strip(),
        "seconds": args.seconds,
        "recipe": RECIPE,
        "arms": {name: {"changes": ARMS[name], "runs": []} for name in args.arms},
    }
    gauge = Gauge(args.model, args.english)
    with tempfile.TemporaryDirectory() as work:
        for seed in range(args.seeds):
            for name in args.arms:
                run = train(args, Path(work) / f"{seed} {name}", seed, ARMS[name])
                if "base" not in result:
                    result["base"] = gauge.measure(args.model, "", run["held_out"])
                model = run.pop("model")
                run |= gauge.measure(
                    args.model if run["adapter"] else model, run["adapter"] and model, run.pop("held_out")
                )
                result["arms"][name]["runs"].append(run)
                print(
                    name,
                    seed,
                    {key: round(run[key], 4) for key in ("x", "y", "z", "agreement", "cpu_seconds")},
                    flush=True,
                )
                write(args.out, result)


def write(file: Path, result: dict[str, Any]) -> None:
    """Write the results so far, with the mean of each arm."""
    for arm in result["arms"].values():
        if arm["runs"]:
            arm["mean"] = {
                key: statistics.fmean(run[key] for run in arm["runs"]) for key in ("x", "y", "z", "agreement")
            }
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(result, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def train(args: argparse.Namespace, folder: Path, seed: int, changes: list[str]) -> dict[str, Any]:
    """Train as many steps as fit into the seconds, everything else counted; return the run and where its model is."""
    folder.mkdir(parents=True)
    recipe = folder / "recipe.yaml"
    settings = {
        "model": args.model,
        "text": args.text,
        "out": folder / "out",
        "seed": seed,
        "precision": args.precision,
    }
    recipe.write_text(RECIPE.format(**settings), encoding="utf-8")
    overrides = [f"pretrain.{change}" for change in changes]
    environment = {
        "XDG_CACHE_HOME": str(folder / "cache")
    }  # own answers of the base are made, and counted, by each arm
    os.environ |= environment
    tongwen("run", str(recipe), "--only", "prepare")
    before = cpu_of_children()
    tongwen("run", str(recipe), *overrides, "--only", "pretrain")
    short = cpu_of_children() - before
    lines = metrics(folder)
    per_step = (lines[-1]["cpu_seconds"] - lines[0]["cpu_seconds"]) / (len(lines) - 1)
    steps = max(2, int((args.seconds - (short - 3 * per_step)) / per_step))
    environment["XDG_CACHE_HOME"] = str(folder / "cache again")
    os.environ |= environment
    before = cpu_of_children()
    tongwen("run", str(recipe), *overrides, f"pretrain.stop_after={steps} steps", "--only", "pretrain", "--again")
    stage = folder / "out" / "pretrain"
    report = json.loads((stage / "report.json").read_text(encoding="utf-8"))
    return {
        "seed": seed,
        "steps": steps,
        "cpu_seconds": cpu_of_children() - before,
        "keep": report.get("keep"),
        "adapter": (stage / "adapter_config.json").is_file(),
        "model": str(stage),
        "held_out": [row["text"] for row in documents(folder / "out/prepare/documents.held_out.jsonl")][:TEXTS],
    }


class Gauge:
    """The base's own answers, with its distribution at every token, and the held-out English text."""

    def __init__(self, model: str, english: str) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(model)
        base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
        articles = [line for line in Path(english).read_text(encoding="utf-8").splitlines() if len(line) > 1500]
        self.english = [article[:1500] for article in articles[:TEXTS]]
        self.rows = [self._answer(base, prompt) for prompt in PROMPTS.read_text(encoding="utf-8").splitlines()]
        self.expected = [self._log_probs(base, *row).half() for row in self.rows]

    def _answer(self, base: Any, prompt: str) -> tuple[torch.Tensor, int]:
        """Return (ids (1, L) of prompt and answer, number of the prompt's)."""
        turns = [{"role": "user", "content": prompt}]
        asked = self.tokenizer.apply_chat_template(
            turns, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        with torch.no_grad():
            whole = base.generate(**asked, max_new_tokens=ANSWER, do_sample=False)
        return whole, asked["input_ids"].shape[1]

    @staticmethod
    def _log_probs(model: Any, ids: torch.Tensor, asked: int) -> torch.Tensor:
        with torch.no_grad():
            return model(ids).logits[0, asked - 1 : -1].float().log_softmax(-1)  # type: ignore[no-any-return]

    def measure(self, folder: str, adapter: str, held_out: list[str]) -> dict[str, float]:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        if adapter:
            from peft import PeftModel

            model = PeftModel.from_pretrained(model, adapter).merge_and_unload()
        model.eval()
        nats, agreed, count = 0.0, 0, 0
        for (ids, asked), base in zip(self.rows, self.expected, strict=True):
            own, expected = self._log_probs(model, ids, asked), base.float()
            nats += float((expected.exp() * (expected - own)).sum())
            agreed += int((expected.argmax(-1) == own.argmax(-1)).sum())
            count += len(own)
        found = {"z": nats / count, "agreement": agreed / count}
        return {"x": self._bits(model, held_out), "y": self._bits(model, self.english), **found}

    def _bits(self, model: Any, texts: list[str]) -> float:
        """Return bits per byte, each text by itself behind the token that begins one."""
        nats, size = 0.0, 0
        for ids, text in self._encoded(texts):
            with torch.no_grad():
                logits = model(ids).logits[0, :-1].float()
            nats += float(cross_entropy(logits, ids[0, 1:], reduction="sum"))
            size += len(text.encode())
        return nats / size / math.log(2)

    def _encoded(self, texts: list[str]) -> Iterator[tuple[torch.Tensor, str]]:
        first = self.tokenizer.bos_token_id if self.tokenizer.bos_token_id is not None else self.tokenizer.eos_token_id
        for text in texts:
            ids = self.tokenizer(text, add_special_tokens=False)["input_ids"][: TEXT - 1]
            yield torch.tensor([[first, *ids]]), self.tokenizer.decode(ids)


if __name__ == "__main__":
    main()
