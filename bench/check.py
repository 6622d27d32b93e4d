"""Measure again every figure that the README quotes, in short form, and fail when one is off by more than a quarter.

    make bench-check MODEL=SMOLLM2_FOLDER TEXT=zh_docs.txt OTHER=en_wiki.txt        # a quarter of an hour on one core
    python bench/check.py --model … --text … --other … --data alpaca_zh.json --peer PEER_VENV/bin/python --long

Ratios are taken within one run. A figure that this machine cannot measure (another processor, no peer) is listed as not
checked. tests/bench/test_check.py holds that the table below has every figure of both READMEs.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SECTIONS = {"README.md": "## Measured", "README_zh.md": "## 实测"}
TOLERANCE = 0.25


@dataclass(frozen=True)
class Run:
    """A script in the form that measures figures again.

    command: arguments for Python, with {model}, {text}, {other}, {data}, {peer}, {folder}; found: the JSON that it writes
    result:  the committed result of the whole form, in bench/results
    needs:   what a machine must have for it
    """

    command: str
    found: str = "{folder}/found.json"
    result: str = ""
    needs: tuple[str, ...] = ()


@dataclass(frozen=True)
class Figure:
    """A figure of the README: its words in both languages, its value, and where a run has it."""

    english: str
    chinese: str
    value: float
    run: str
    key: Callable[[Any], float]


RUNS = {
    "vocab": Run(
        "bench/vocab.py --short --model {model} --text {text} --other {other} --out {folder}/found.json",
        result="vocab.json",
    ),
    "merge": Run(
        "bench/merge.py --folder {folder} --sizes 2B --repeats 1 --out {folder}/found.json", result="merge.json"
    ),
    "demo": Run("-m tongwen demo --out {folder}/demo --model {model}", found="{folder}/demo/sft/report.json"),
    "sft": Run(
        "bench/sft_cpu.py --peer {peer} --model {model} --data {data} --precision bf16 --rounds 1 --out {folder}/found.json",
        result="sft_cpu_amx_bf16.json",
        needs=("amx_bf16", "peer"),
    ),
    "cpt": Run(
        "bench/cpt_cpu.py --peer {peer} --model {model} --text {text} --precision bf16 --seconds 600 --out {folder}/found.json",
        result="cpt_cpu.json",
        needs=("amx_bf16", "peer", "long"),
    ),
    "pipeline": Run(
        "bench/data_pipeline.py --text {text} --tokenizer {model} --sizes 2048 --out {folder}/found.json",
        result="data_pipeline_2gb.json",
        needs=("long",),
    ),
    "gpu": Run(
        "bench/gpu_train.py --only 'lora tongwen$' --out {folder}/found.json", result="gpu_train.json", needs=("H100",)
    ),
}


def on_gpu(task: str, key: str) -> Callable[[Any], float]:
    """Return what finds the figure in the best run."""
    return lambda found: max(run["tasks"].get(task, {}).get("tongwen", {}).get(key) or 0 for run in found["runs"])


def named(when: str) -> Callable[[Any], float]:
    """Return what counts the answers of the demo that have the name."""
    return lambda found: sum("小同" in sample[when] for sample in found["samples"][:8])


FIGURES = [
    Figure("0.36 of the CPU time", "的 0.36", 0.36, "sft", lambda found: found["of_peer_default"]),
    Figure("0.62 of its best", "的 0.62", 0.62, "sft", lambda found: found["of_peer_best"]),
    Figure("in 38 % of", "后者的 38 %", 0.38, "sft", lambda found: found["memory_of_peer_best"]),
    Figure("16 % fewer bits", "低 16 %", 0.16, "cpt", lambda found: 1 - found["of_peer"]["tongwen"]),
    Figure(
        "three quarters of the CPU time",
        "四分之三的 CPU 时间",
        0.75,
        "cpt",
        lambda found: found["runs"]["tongwen"]["cpu_seconds"] / found["runs"]["peer"]["cpu_seconds"],
    ),
    Figure("59,700 tokens a second", "每秒 59,700 个", 59_700, "gpu", on_gpu("1B lora", "tokens_per_second")),
    Figure("an 8B 14,300", "8B 每秒 14,300 个", 14_300, "gpu", on_gpu("8B lora", "tokens_per_second")),
    Figure("(28 and", "28 % 与", 0.28, "gpu", on_gpu("1B lora", "mfu")),
    Figure("43 % of what the card", "43 %）", 0.43, "gpu", on_gpu("8B lora", "mfu")),
    Figure("785 MB of memory", "785 MB 内存", 785, "pipeline", lambda found: found["runs"][-1]["peak_mb"]["whole"]),
    Figure(
        "double the Chinese",
        "两倍的中文",
        2,
        "vocab",
        lambda found: (per := found["learning"]["characters_per_token"])["2000"] / per["base"],
    ),
    Figure(
        "change no line of English or Python",
        "英文与 Python 一行不变",
        0,
        "vocab",
        lambda found: sum(
            found["learning"]["with 2000"][f"changed_lines_of_{of}"] for of in ("the_other_text", "python")
        ),
    ),
    Figure(
        "in 53 MB of memory",
        "只用 53 MB 内存",
        53,
        "vocab",
        lambda found: max(each["peak_rss_bytes"] for each in found["growing"].values()) / 1e6,
    ),
    Figure("in 67 MB", "只需 67 MB 内存", 67, "merge", lambda found: found["2B"]["tongwen, 1"]["peak_mb"]),
    Figure(
        "half of peft's CPU time",
        "约为 peft 的一半",
        0.5,
        "merge",
        lambda found: found["2B"]["tongwen, 1"]["cpu_seconds"] / found["2B"]["peft, 1"]["cpu_seconds"],
    ),
    Figure("peft: 4.6 GB", "peft：4.6 GB", 4.6, "merge", lambda found: found["2B"]["peft, 1"]["peak_mb"] / 1000),
    Figure("from 2.412", "从 2.412", 2.412, "demo", lambda found: found["held_out"]["bits_per_byte"]["before"]),
    Figure("to 2.108", "降到 2.108", 2.108, "demo", lambda found: found["held_out"]["bits_per_byte"]["after"]),
    Figure("seven times", "七次说对名字", 7, "demo", named("after")),
    Figure("before: never", "训练前一次也没有", 0, "demo", named("before")),
]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of SmolLM2-135M-Instruct")
    parser.add_argument("--text", required=True)
    parser.add_argument("--other", required=True)
    parser.add_argument("--data", help="alpaca_zh.json, for the comparisons with a peer")
    parser.add_argument("--peer", help="python of the peers' environment")
    parser.add_argument("--long", action="store_true", help="also what takes half an hour and more")
    parser.add_argument("--only", nargs="+", choices=list(RUNS), default=list(RUNS))
    args = parser.parse_args()
    absent = [f"{page}: {words}" for page, words in missing_words()]
    off, unchecked = len(absent), 0
    for text in absent:
        print("OFF         ", text, "is not there any more")
    for name, run in RUNS.items():
        reason = "left out by --only" if name not in args.only else lacking(run, args)
        found = None if reason else measure(name, run, args)
        for figure in (figure for figure in FIGURES if figure.run == name):
            if reason:
                unchecked += 1
                print(f"not checked  {figure.english}: {reason}")
                continue
            value = figure.key(found)
            off += not holds(figure, value)
            print(
                "ok          " if holds(figure, value) else "OFF         ", f"{figure.english}: {value:.4g}", flush=True
            )
    print(f"{len(FIGURES) - unchecked} figures measured, {unchecked} not checked, {off} off")
    return 1 if off else 0


def holds(figure: Figure, value: float) -> bool:
    return abs(value - figure.value) <= TOLERANCE * figure.value


def missing_words() -> list[tuple[str, str]]:
    """Return the page and the words of figures that a README does not have."""
    english, chinese = (measured_section(page) for page in SECTIONS)
    return [
        *(("README.md", figure.english) for figure in FIGURES if figure.english not in english),
        *(("README_zh.md", figure.chinese) for figure in FIGURES if figure.chinese not in chinese),
    ]


def measured_section(page: str) -> str:
    """Return the text of a README's measurements, in one line."""
    text = (ROOT / page).read_text(encoding="utf-8").split(f"{SECTIONS[page]}\n")[1].split("\n## ")[0]
    return " ".join(text.split())


def lacking(run: Run, args: argparse.Namespace) -> str:
    """Return what the machine or the command line lacks for a run, or an empty text."""
    reasons = {
        "amx_bf16": "" if "amx_bf16" in cpu_flags() else "this processor has no amx_bf16",
        "peer": "" if args.peer and args.data else "needs --peer and --data",
        "long": "" if args.long else "takes half an hour or more: --long",
        "H100": "" if "H100" in gpu() else "needs an H100",
    }
    return "; ".join(reasons[need] for need in run.needs if reasons[need])


def cpu_flags() -> Sequence[str]:
    file = Path("/proc/cpuinfo")
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    return next((line.split() for line in lines if line.startswith("flags")), [])


def gpu() -> str:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else ""


def measure(name: str, run: Run, args: argparse.Namespace) -> Any:
    """Run the short form; return what it found."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryDirectory() as folder:
        places = {**vars(args), "folder": folder}
        command = [sys.executable, *(word.format(**places) for word in shlex.split(run.command))]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{name} failed:\n{done.stderr[-3000:]}")
        return json.loads(Path(run.found.format(**places)).read_text(encoding="utf-8"))


if __name__ == "__main__":
    sys.exit(main())
