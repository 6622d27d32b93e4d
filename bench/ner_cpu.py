"""Named entities of MSRA with a small model on a CPU: SmolLM2 + LoRA with one recipe, entity F1 before and after.

    python bench/ner_cpu.py --model SMOLLM2_FOLDER --data msra_ner.jsonl --out bench/results/ner_cpu.json

Forty rows are held out; an answer lists one entity a line, `实体_类型`, and counts by name and type. The result
contains the loss of each step; the loss curve of the run's report is saved beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from sft_cpu import processor

RECIPE = """\
name: ner
base: {model}
out: {out}
prepare: {{dialogues: {data}, held_out: 40}}
sft:
  template: chatml
  adapter: {{method: lora, rank: 16}}
  max_length: 512
  batch_size: 4
  learning_rate: 1e-3
  stop_after: {epochs} epochs
  samples: 0
evaluate: {{tasks: [entity_f1], max_new_tokens: 96}}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=2)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        recipe = Path(folder) / "recipe.yaml"
        settings = {"model": args.model, "data": args.data, "epochs": args.epochs}
        recipe.write_text(RECIPE.format(**settings, out=f"{folder}/out"), encoding="utf-8")
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        subprocess.run([sys.executable, "-m", "tongwen", "run", str(recipe)], env=environment, check=True)
        sft = Path(folder) / "out" / "sft"
        lines = [json.loads(line) for line in (sft / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        report = json.loads((sft / "report.json").read_text(encoding="utf-8"))
        scores = json.loads((Path(folder) / "out/evaluate/scores.json").read_text(encoding="utf-8"))
        versions = json.loads((sft / "manifest.json").read_text(encoding="utf-8"))["versions"]
        args.out.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(sft / "loss.png", args.out.with_suffix(".png"))
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    result = {
        "machine": {"processor": processor(), "cpus": os.cpu_count(), "python": platform.python_version()},
        "commit": commit.stdout.strip(),
        "versions": versions,
        "recipe": RECIPE,
        "scores": scores,
        "held_out": report["held_out"],
        "cpu_seconds_at_the_end": lines[-1]["cpu_seconds"],
        "losses": [line["loss"] for line in lines],
    }
    args.out.write_text(json.dumps(result, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
