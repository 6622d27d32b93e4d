"""Answer 64 prompts with up to 64 tokens each on one core: new tokens per CPU second, peak memory, and equality of the text.

    python bench/generate_cpu.py --model SMOLLM2_FOLDER --dialogues alpaca_zh.json --out bench/results/generate_cpu.json

`generate`: transformers' usual call, batches of 8 in file order, padded on the left. `batched` and `paged`: tongwen's two
engines on transformers. `llama.cpp`: the model as Q4_1 GGUF, so with other weights. Each runs in its own process, in turn, in
fp32; loading is not counted.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path
from typing import Any

sys.path.pop(0)  # this folder, whose gguf.py is not the package
PROMPTS, TOKENS, BATCH = 64, 64, 8
WAYS = ("generate", "batched", "paged", "llama.cpp")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--dialogues", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    rows = json.loads(args.dialogues.read_text(encoding="utf-8"))
    prompts = [row["instruction"] for row in rows if not row["input"] and len(row["instruction"]) < 60][:PROMPTS]
    if args.way:
        print(json.dumps(measure(args.way, args.model, prompts)))
        return
    rounds: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        tongwen = [sys.executable, "-m", "tongwen", "convert", args.model, "--to", "gguf", "--quantize", "q4_1"]
        subprocess.run([*tongwen, "--out", f"{folder}/gguf"], check=True, stdout=subprocess.DEVNULL)
        (file,) = Path(folder, "gguf").glob("*.gguf")
        for _ in range(args.rounds):
            found = {way: in_a_process(way, file if way == "llama.cpp" else args.model, args) for way in WAYS}
            plain = found["generate"]["answers"]
            for way in found.values():
                way["same_text"] = sum(one == two for one, two in zip(way.pop("answers"), plain, strict=True))
                way["times_generate"] = round(
                    way["tokens_per_cpu_second"] / found["generate"]["tokens_per_cpu_second"], 2
                )
            rounds.append(found)
            print(json.dumps(found), flush=True)
    result = {
        "machine": platform.platform(),
        "cpus": os.cpu_count(),
        "versions": {name: metadata.version(name) for name in ("torch", "transformers", "xllamacpp")},
        "rounds": rounds,
    }
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def in_a_process(way: str, model: object, args: argparse.Namespace) -> dict[str, Any]:
    command = [sys.executable, __file__, "--way", way, "--model", str(model), "--dialogues", str(args.dialogues)]
    done = subprocess.run(
        command, check=True, text=True, stdout=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    return dict(json.loads(done.stdout.splitlines()[-1]))


def measure(way: str, model: str, prompts: list[str]) -> dict[str, Any]:
    from tongwen.infer.generation import Sampling
    from tongwen.workflows.chat_model import open_chat_model

    engine = way if way != "generate" else "batched"
    speaker = open_chat_model(model, precision="fp32", engine=engine)
    ids = [speaker.prompt_ids([{"role": "user", "content": prompt}]) for prompt in prompts]
    sampling, answers = Sampling(max_new_tokens=TOKENS), dict[int, list[int]]()
    cpu, wall = time.process_time(), time.monotonic()
    if way == "generate":
        for begin in range(0, len(ids), BATCH):
            for place, answer in enumerate(speaker.generator.answer(ids[begin : begin + BATCH], sampling), begin):
                answers[place] = answer
    else:
        speaker.generator.answer_all(ids, sampling, answers.__setitem__)
    cpu, wall = time.process_time() - cpu, time.monotonic() - wall
    tokens = sum(map(len, answers.values()))
    return {
        "tokens": tokens,
        "prompt_tokens": sum(map(len, ids)),
        "cpu_seconds": round(cpu, 1),
        "seconds": round(wall, 1),
        "tokens_per_cpu_second": round(tokens / cpu, 1),
        "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "answers": [answers[place] for place in range(len(ids))],
    }


if __name__ == "__main__":
    main()
