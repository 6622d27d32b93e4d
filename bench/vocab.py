"""Vocabulary: learning merges, their compression, encoding speed, and the memory for growing a model.

    python bench/vocab.py --model SMOLLM2_FOLDER --text zh_docs.txt --other en_wiki.txt --out bench/results/vocab.json

Merges are learned from an eighth, a quarter, a half and all of the text (CPU seconds of this process), each time the
same number; compression is measured on every tenth line, which is held out. Growing is measured in its own process, on random Llama-shaped models in bf16, by its peak resident memory.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

SHAPES = {
    "0.1 B, 32k rows": (576, 30, 32_000),
    "1 B, 128k rows": (2048, 16, 128_256),
    "2 B, 152k rows": (2048, 32, 151_936),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--text")
    parser.add_argument("--other", help="text of the base's own language")
    parser.add_argument("--out")
    parser.add_argument("--short", action="store_true", help="the whole text, 2,000 pieces and the smallest model only")
    parser.add_argument("--grow", help="internal: folder of a model to grow in this process")
    args = parser.parse_args()
    if args.grow:
        grow(Path(args.grow))
        return
    found = {"machine": machine(), "learning": learning(args), "growing": growing(args.short)}
    Path(args.out).write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(json.dumps(found, indent=1))


def learning(args: argparse.Namespace) -> dict[str, Any]:
    from tongwen.vocab import measure
    from tongwen.vocab.script import Script
    from tongwen.workflows import tokenizer_files, vocab_pieces

    base, han = tokenizer_files.open_tokenizer_files(args.model), Script("han")
    lines = Path(args.text).read_text(encoding="utf-8").splitlines()
    held_out, rest = lines[::10], [line for place, line in enumerate(lines) if place % 10]
    english = Path(args.other).read_text(encoding="utf-8").splitlines()
    library = sorted(Path(json.__file__).parents[1].glob("*.py"))  # Python's own
    python = [line for file in library for line in file.read_text(encoding="utf-8").splitlines()]
    costs = {}
    for part in (1,) if args.short else (8, 4, 2, 1):
        began = time.process_time()
        learned = vocab_pieces.learn(base, rest[::part], han, 8000)
        costs[f"{sum(len(line.encode()) for line in rest[::part]) / 1e6:.2f} MB"] = {
            "cpu_seconds": round(time.process_time() - began, 2),
            "pieces": len(learned),
        }
    out: dict[str, Any] = {"cpu_seconds_of_8000_merges": costs, "characters_per_token": {}}
    out["characters_per_token"]["base"] = measure.fertility(base.coder, held_out)["characters_per_token"]
    for pieces in (2000,) if args.short else (1000, 2000, 4000, 8000):
        made = learned.extended(pieces).files.coder
        out["characters_per_token"][pieces] = measure.fertility(made, held_out)["characters_per_token"]
        speeds = [measure.seconds_per_megabyte(one, lines[:20_000]) for one in (base.coder, made)]
        out[f"with {pieces}"] = {
            "changed_lines_of_the_other_text": len(measure.changed(base.coder, made, english)),
            "changed_lines_of_python": len(measure.changed(base.coder, made, python)),
            "new_round_trip_failures": len(
                set(measure.round_trip_failures(made, lines[:10_000]))
                - set(measure.round_trip_failures(base.coder, lines[:10_000]))
            ),
            "time_to_encode_the_base_is_1": round(speeds[1] / speeds[0], 3),
        }
    out["lines"] = {"other": len(english), "python": len(python), "round_trip": 10_000}
    return out


def growing(short: bool) -> dict[str, Any]:
    out = {}
    for name, (hidden, layers, rows) in list(SHAPES.items())[: 1 if short else None]:
        with tempfile.TemporaryDirectory() as folder:
            size = make_model(Path(folder), hidden, layers, rows)
            done = subprocess.run(
                [sys.executable, __file__, "--grow", folder], capture_output=True, text=True, check=True
            )
            out[name] = {"model_bytes": size, **json.loads(done.stdout)}
    return out


def make_model(folder: Path, hidden: int, layers: int, rows: int) -> int:
    """Write a random model tensor by tensor; return its size in bytes."""
    import numpy as np

    from tongwen.core.safetensors_io import plan_shards

    shapes = {"model.embed_tokens.weight": (rows, hidden), "lm_head.weight": (rows, hidden)}
    for layer in range(layers):
        for part, shape in {
            "self_attn.q_proj": (hidden, hidden),
            "self_attn.o_proj": (hidden, hidden),
            "mlp.gate_proj": (4 * hidden, hidden),
            "mlp.up_proj": (4 * hidden, hidden),
            "mlp.down_proj": (hidden, 4 * hidden),
        }.items():
            shapes[f"model.layers.{layer}.{part}.weight"] = shape
    random = np.random.default_rng(0)
    planned = plan_shards(folder, {name: ("BF16", shape) for name, shape in shapes.items()}, 5_000_000_000)
    for place in planned.values():
        with place.file.open("r+b") as stream:
            stream.seek(place.begin)
            left = place.size // 2
            while left:
                count = min(left, 1 << 22)
                block = random.normal(0, 0.02, count).astype(np.float32)
                stream.write((block.view(np.uint32) >> 16).astype(np.uint16).tobytes())
                left -= count
    return sum(place.size for place in planned.values())


def grow(folder: Path) -> None:
    """Add 2,000 rows, each the mean of three old ones; print seconds and peak memory of this process."""
    from tongwen.model.loading.tensors import open_tensors, read_fp32
    from tongwen.model.merging import resize
    from tongwen.vocab.grow import iter_rows

    base = open_tensors(folder, "*.bin")
    names = resize.matrices_of(base, str(folder))
    old = base.facts[names[0]][1][0]
    rows = resize.plan_rows(old, range(old, old + 2000), old, 64)
    parts = [[place, place + 7, place + 31] for place in range(2000)]
    out = folder / "out"
    out.mkdir()
    wall, cpu = time.monotonic(), time.process_time()
    resize.resize_vocabulary(
        base,
        {},
        names,
        rows,
        lambda name: iter_rows(
            "subtoken_mean", parts, old, lambda a, b: read_fp32(base, name, a, b), padding=rows.padding
        ),
        out,
        lambda done: None,
    )
    found = {
        "wall_seconds": round(time.monotonic() - wall, 2),
        "cpu_seconds": round(time.process_time() - cpu, 2),
        "peak_rss_bytes": peak_rss_bytes(),
    }
    print(json.dumps(found))


def peak_rss_bytes() -> int:
    """Return the peak memory of this process; ru_maxrss may contain an inherited value of its parent."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


def machine() -> dict[str, Any]:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "")
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return {
        "processor": name,
        "cpus": os.cpu_count(),
        "python": platform.python_version(),
        "commit": commit.stdout.strip(),
    }


if __name__ == "__main__":
    main()
