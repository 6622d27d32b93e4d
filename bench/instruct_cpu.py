"""Chinese instruction tuning of a small model on a CPU: effect of 700 rows of alpaca_zh, on held-out rows and BELLE's questions.

    python bench/instruct_cpu.py --model SMOLLM2_FOLDER --data alpaca_zh.json --belle belle_eval.jsonl --out bench/results/instruct_cpu.json

One recipe fine-tunes SmolLM2 with LoRA and scores the held-out rows; `tongwen evaluate --before` then asks both models the same
questions of BELLE. Bits per byte: 60 held-out answers and BELLE's first 60; ROUGE: `--questions` greedy answers. With
`--folder` a repeated command continues a killed one.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from sft_cpu import processor

RECIPE = """\
name: instruct
base: {model}
out: {out}
prepare: {{dialogues: {data}, held_out: 60}}
sft:
  template: chatml
  adapter: {{method: lora, rank: 16}}
  max_length: 1024
  batch_size: 8
  learning_rate: 5e-4
  stop_after: {epochs} epochs
  samples: 0
evaluate:
  tasks: [bits_per_byte, {{task: rouge, limit: {questions}}}]
  max_new_tokens: 128
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True, help="alpaca_zh.json")
    parser.add_argument("--belle", required=True, help="belle_eval.jsonl")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--questions", type=int, default=30)
    parser.add_argument("--folder", type=Path, help="for the run; kept")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = args.folder or Path(name)
        settings = {"model": args.model, "data": args.data, "epochs": args.epochs, "questions": args.questions}
        (folder / "recipe.yaml").write_text(RECIPE.format(**settings, out=folder / "out"), encoding="utf-8")
        tongwen("run", str(folder / "recipe.yaml"))
        sft, belle = folder / "out" / "sft", folder / "belle"
        of_both = ["--model", args.model, "--adapter", str(sft), "--before", args.model, "--data", args.belle]
        tongwen("evaluate", *of_both, "--task", "bits_per_byte", "--limit", "60", "--out", str(belle / "all"))
        few = ["--limit", str(args.questions), "--max-new-tokens", "128"]
        tongwen("evaluate", *of_both, "--task", "rouge", *few, "--out", str(belle / "few"))
        lines = [json.loads(line) for line in (sft / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        found = {
            "held_out": read(folder / "out/evaluate/scores.json"),
            "belle": {"bits_per_byte": read(belle / "all/scores.json"), "rouge": read(belle / "few/scores.json")},
            "versions": read(sft / "manifest.json")["versions"],
        }
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    result = {
        "machine": {"processor": processor(), "cpus": os.cpu_count(), "python": platform.python_version()},
        "commit": commit.stdout.strip(),
        "recipe": RECIPE,
        **found,
        "cpu_seconds_at_the_end": lines[-1]["cpu_seconds"],
        "losses": [line["loss"] for line in lines],
    }
    args.out.write_text(json.dumps(result, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def tongwen(*arguments: str) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    subprocess.run([sys.executable, "-m", "tongwen", *arguments], env=environment, check=True)


def read(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
