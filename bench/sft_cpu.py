"""LoRA SFT on a CPU, side by side: tongwen and LLaMA-Factory in turn, in one run, each in its own environment.

    sh bench/peers/install.sh PEER_VENV
    python bench/sft_cpu.py --peer PEER_VENV/bin/python --model SMOLLM2_FOLDER --data alpaca_zh.json --out bench/results/sft_cpu.json

Rank 8, all linear layers, max length 512, 8 samples per optimizer step, one thread each, fp32 or (on a CPU
that computes in it) bf16 for all. The figure is CPU time
(user and system, of the whole process) between the end of step 2 and the end of the last step, divided by the real
tokens that were trained in between; and the process's peak resident memory. The median of the rounds is quoted.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

PADDED = (
    "default, 8 x 1"  # the trainer's own batch when only "8 samples per step" is asked: padded rows, no accumulation
)
PEERS = {
    "default": ["--mode", "default"],
    PADDED: ["--mode", "default", "--micro-batch", "8", "--accumulation", "1"],
    "checkpointing off": ["--mode", "nockpt"],
    "checkpointing off, neat_packing": ["--mode", "neat_packing"],
    "checkpointing off, length grouping, 8 x 1": ["--mode", "grouped", "--micro-batch", "8", "--accumulation", "1"],
}
RECIPE = """\
name: bench
base: {model}
out: {out}
prepare: {{dialogues: {data}, held_out: 0}}
sft:
  template: chatml
  adapter: {{method: lora, rank: 8, alpha: 16, targets: all-linear}}
  max_length: 512
  batch_size: 8
  learning_rate: 1e-4
  precision: {precision}
  stop_after: {steps} steps
  samples: 0
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", required=True, help="python of the peer's environment")
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--out", required=True)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="of all contestants")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--without", action="append", default=[], choices=list(PEERS)[1:], help="leave out a configuration"
    )
    args = parser.parse_args()
    rows: dict[str, list[dict[str, Any]]] = {
        "tongwen": [],
        **{name: [] for name in PEERS if name not in args.without},
    }
    for turn in range(args.rounds):
        rows["tongwen"].append(ours(args))
        for name in list(rows)[1:]:
            rows[name].append(theirs(args, PEERS[name]))
        for name, found in rows.items():
            print(
                turn + 1,
                f"{name:44s}",
                f"{found[-1]['cpu_ms_per_token']:.2f} ms/token",
                f"{found[-1]['peak_rss_bytes'] / 1e9:.2f} GB",
                flush=True,
            )
        write(args, rows)  # after every round: what was measured is kept when the run is stopped


def ours(args: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        recipe = Path(folder) / "recipe.yaml"
        recipe.write_text(
            RECIPE.format(
                model=args.model,
                data=args.data,
                out=f"{folder}/out",
                steps=args.steps,
                precision=args.precision,
            ),
            encoding="utf-8",
        )
        run([sys.executable, "-m", "tongwen", "run", str(recipe), "--json"])
        stage = Path(folder) / "out" / "sft"
        lines = [json.loads(line) for line in (stage / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        report = json.loads((stage / "report.json").read_text(encoding="utf-8"))
        versions = json.loads((stage / "manifest.json").read_text(encoding="utf-8"))["versions"]
    first, last = lines[1], lines[-1]
    tokens = last["tokens"] - first["tokens"]
    spent = last["cpu_seconds"] - first["cpu_seconds"]
    return {
        "cpu_ms_per_token": 1000 * spent / tokens,
        "real_tokens": tokens,
        "peak_rss_bytes": report["peak_memory_bytes"],
        "losses": [line["loss"] for line in lines],
        "versions": versions,
    }


def theirs(args: argparse.Namespace, options: list[str]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        script = Path(__file__).parent / "peers" / "llamafactory.py"
        arguments = [
            "--model",
            args.model,
            "--data",
            args.data,
            "--steps",
            str(args.steps),
            "--threads",
            "1",
            "--precision",
            args.precision,
            "--out",
            str(result),
        ]
        run([args.peer, str(script), *arguments, *options])
        found: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
    return {key: found[key] for key in ("cpu_ms_per_token", "real_tokens", "peak_rss_bytes", "losses", "versions")}


def run(command: list[str]) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")


def write(args: argparse.Namespace, rows: dict[str, list[dict[str, Any]]]) -> None:
    median = {name: statistics.median(one["cpu_ms_per_token"] for one in found) for name, found in rows.items()}
    memory = {name: statistics.median(one["peak_rss_bytes"] for one in found) for name, found in rows.items()}
    best = min((name for name in rows if name.startswith("checkpointing off")), key=lambda name: median[name])
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    summary = {
        "machine": {"processor": processor(), "cpus": os.cpu_count(), "python": platform.python_version()},
        "commit": commit,
        "steps": args.steps,
        "precision": args.precision,
        "rounds": len(rows["tongwen"]),
        "median_cpu_ms_per_token": median,
        "median_peak_rss_bytes": memory,
        "of_peer_default": median["tongwen"] / median["default"],
        **({"of_peer_default_8x1": median["tongwen"] / median[PADDED]} if PADDED in median else {}),
        "peer_best": best,
        "of_peer_best": median["tongwen"] / median[best],
        "memory_of_peer_best": memory["tongwen"] / memory[best],
    }
    target = Path(args.out)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps({**summary, "runs": rows}, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(summary, indent=1))


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


if __name__ == "__main__":
    main()
