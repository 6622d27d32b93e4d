"""Compare the peak memory of `tongwen plan` with three runs of a real model: LoRA, QLoRA (nf4), full; fp32.

    python bench/plan_memory.py --model SMOLLM2_FOLDER --data alpaca_zh.json --out bench/results/plan_memory.json

The measured value is the peak resident memory of the process, `peak_memory_bytes` of report.json. The allocator's settings are
fixed: one arena, and a separate mapping for each larger block, so that freed memory is returned. With its default settings a
CPU run keeps freed memory and takes a tenth to a quarter more.
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

ALLOCATOR = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
RECIPE = """\
name: bench
base: {model}
out: {out}
prepare: {{dialogues: {data}, held_out: 2}}
sft:
  template: chatml
  adapter: {adapter}
  max_length: 512
  batch_tokens: 2048
  stop_after: {steps} steps
  precision: fp32
  samples: 0
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=2, help="the second one meets the optimizer's state")
    args = parser.parse_args()
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    found = {}
    for method in ("lora", "qlora", "full"):
        found[method] = compare(args, method)
        print(method, {name: found[method][name] for name in ("planned", "measured", "off_by")}, flush=True)
    result = {
        "machine": {"processor": processor(), "cpus": os.cpu_count(), "python": platform.python_version()},
        "commit": commit.stdout.strip(),
        "allocator": ALLOCATOR,
        "worst": max(abs(one["off_by"]) for one in found.values()),
        "methods": found,
    }
    args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def compare(args: argparse.Namespace, method: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        recipe = Path(folder) / "recipe.yaml"
        adapter = "{method: full}" if method == "full" else f"{{method: {method}, rank: 8}}"
        settings = {"model": args.model, "data": args.data, "adapter": adapter, "steps": args.steps}
        recipe.write_text(RECIPE.format(**settings, out=f"{folder}/out"), encoding="utf-8")
        plan = json.loads(tongwen("plan", str(recipe), "--json"))
        tongwen("run", str(recipe))
        report = json.loads((Path(folder) / "out/sft/report.json").read_text(encoding="utf-8"))
        versions = json.loads((Path(folder) / "out/sft/manifest.json").read_text(encoding="utf-8"))["versions"]
    planned, measured = plan["memory_bytes"]["peak"], report["peak_memory_bytes"]
    return {
        "planned": planned,
        "measured": measured,
        "off_by": planned / measured - 1,
        "parts": plan["memory_bytes"],
        "versions": versions,
    }


def tongwen(*arguments: str) -> str:
    environment = {**os.environ, **ALLOCATOR, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, "-m", "tongwen", *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stderr[-4000:]}")
    return done.stdout


if __name__ == "__main__":
    main()
