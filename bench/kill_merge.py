"""Kill a merge fifty times: no half-written folder is taken for a model, and a repeated merge gives the same bytes.

    python bench/kill_merge.py --base SMOLLM2_FOLDER --adapter ADAPTER --folder /tmp/killed --out bench/results/kill_merge.json

SIGKILL comes at a random moment after the merge has begun to write. After each kill `tongwen show` must report that there is
no model; after every fifth, the same command runs to its end and its weights are compared byte for byte.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from tongwen.core.artifact import hash_file, partial_of


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True)
    parser.add_argument("--adapter", required=True)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    tongwen = [sys.executable, "-m", "tongwen"]
    merge = [*tongwen, "merge", "--base", args.base, "--adapter", args.adapter, "--out", str(args.folder)]
    started = time.perf_counter()
    subprocess.run(merge, check=True, capture_output=True)
    seconds = time.perf_counter() - started
    whole = hash_file(args.folder / "model.safetensors")
    rng = random.Random(0)
    found = {
        "seed": 0,
        "kills": 0,
        "left_half_written": 0,
        "taken_for_a_model": 0,
        "repeated": 0,
        "repeated_identical": 0,
    }
    while found["kills"] < args.kills:
        for folder in (args.folder, partial_of(args.folder)):
            shutil.rmtree(folder, ignore_errors=True)
        process = subprocess.Popen(merge, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while not partial_of(args.folder).exists() and process.poll() is None:
            time.sleep(0.005)
        time.sleep(rng.random() * seconds * 0.8)
        process.send_signal(signal.SIGKILL)
        process.wait()
        if args.folder.exists():
            continue  # it had finished before the kill
        found["kills"] += 1
        found["left_half_written"] += partial_of(args.folder).exists()
        shown = subprocess.run([*tongwen, "show", str(args.folder)], capture_output=True, check=False)
        found["taken_for_a_model"] += shown.returncode != 4
        if found["kills"] % 5 == 0:
            subprocess.run(merge, check=True, capture_output=True)
            found["repeated"] += 1
            found["repeated_identical"] += hash_file(args.folder / "model.safetensors") == whole
    print(json.dumps(found))
    if args.out:
        args.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
