"""DPO on a CPU: what 100 pairs of `pairs_zh.jsonl` teach SmolLM2, after a short SFT on the dialogues of `tongwen demo`.

    python bench/prefer_cpu.py --model SMOLLM2_FOLDER --out bench/results/prefer_cpu.json

The chosen answer of each pair is friendly and informs; the rejected one is curt and refuses. 24 pairs are held out. The report's
accuracy counts a higher reward for the chosen answer, and equal rewards (as before training) half. CPU seconds are those of
the command that runs `prefer` alone, imports and scoring included; `--kill` also kills it at a step, repeats it, and compares.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from sft_cpu import processor

import tongwen

PAIRS = Path(__file__).parent / "pairs_zh.jsonl"
DIALOGUES = Path(tongwen.__file__).parent / "commands" / "demo_data" / "dialogues.jsonl"
RECIPE = """\
name: prefer
base: {model}
out: {out}
prepare: {{dialogues: {dialogues}, preferences: {pairs}, held_out: 24}}
sft: {{adapter: {{rank: 8}}, batch_size: 4, learning_rate: 2e-4, stop_after: 8 steps, precision: fp32, samples: 0}}
prefer:
  method: dpo
  beta: 0.1
  adapter: {{rank: 8}}
  batch_size: 8
  learning_rate: {rate}
  stop_after: {epochs} epochs
  precision: fp32
  save_every: 4
  samples: 0
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rate", default="5e-5")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--kill", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        out, recipe = folder / "out", folder / "recipe.yaml"
        recipe.write_text(
            RECIPE.format(
                model=args.model, out=out, dialogues=DIALOGUES, pairs=PAIRS, rate=args.rate, epochs=args.epochs
            ),
            encoding="utf-8",
        )
        run(recipe, "--until", "sft")
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        run(recipe)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        report = read(out / "prefer" / "report.json")
        adapter = (out / "prefer" / "adapter_model.safetensors").read_bytes()
        commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
        result: dict[str, Any] = {
            "machine": {"processor": processor(), "cpus": os.cpu_count(), "python": platform.python_version()},
            "commit": commit.stdout.strip(),
            "versions": read(out / "prefer" / "manifest.json")["versions"],
            "recipe": RECIPE,
            "rate": args.rate,
            "epochs": args.epochs,
            "cpu_seconds": round(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, 1),
            "preferences": report["preferences"],
            "bits_per_byte": report["held_out"]["bits_per_byte"],
        }
        if args.kill:
            result["killed_and_resumed_to_the_bit"] = resumes(recipe, out, adapter)
    args.out.write_text(json.dumps(result, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    print(json.dumps({key: result[key] for key in ("cpu_seconds", "preferences", "bits_per_byte")}, indent=1))


def run(recipe: Path, *options: str) -> None:
    subprocess.run([sys.executable, "-m", "tongwen", "run", str(recipe), *options], check=True)


def resumes(recipe: Path, out: Path, adapter: bytes) -> bool:
    """Run `prefer` again, kill it after its sixth step, repeat it; whether it ends with the same adapter."""
    (out / "prefer").rename(out / "first")
    child = subprocess.Popen([sys.executable, "-m", "tongwen", "run", str(recipe)])
    lines = out / "prefer.partial" / "metrics.jsonl"
    while not lines.is_file() or len(lines.read_text(encoding="utf-8").splitlines()) < 6:
        time.sleep(0.1)
    child.send_signal(signal.SIGKILL)
    child.wait()
    run(recipe)
    return adapter == (out / "prefer" / "adapter_model.safetensors").read_bytes()


def read(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
