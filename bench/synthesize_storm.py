"""Synthesize 500 rows from a failing endpoint while being killed a hundred times: no row is lost or doubled, and no complete
answer is requested again.

    python bench/synthesize_storm.py --out bench/results/synthesize_storm.json

One request in five gets 429, 500, silence, broken JSON or half a stream. SIGKILL comes after a random number of requests;
the same command continues. The endpoint counts its complete answers per question.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from fault_endpoint import Faults

FAULTS = ("429 0.1", "500", "sleep 3", "broken", "cut")
CONCURRENCY = 4


def answer(prompt: str) -> str:
    """Return a task unique to the prompt: characters drawn by its hash."""
    rng = random.Random(hashlib.sha256(prompt.encode()).digest())
    texts = ["".join(chr(rng.randrange(0x4E00, 0x9FA5)) for _ in range(12)) for _ in range(2)]
    return json.dumps({"items": [{"instruction": texts[0], "input": "", "output": texts[1] * 12}]}, ensure_ascii=False)


def storm(folder: Path, rows: int, kills: int, seed: int = 0) -> dict[str, int]:
    """Kill and continue the command `kills` times, then let it end. Return counts from the endpoint and the rows."""
    rng = random.Random(seed)
    faults = Faults(lambda prompt, times: rng.choice(FAULTS) if rng.random() < 0.2 else "", answer, seconds=0.05)
    recipe = folder / "recipe.yaml"
    recipe.write_text(
        f"name: storm\nbase: none\nout: {folder / 'out'}\nsynthesize: {{endpoint: '{faults.url}', model: m, method: topics, "
        f"rows: {rows}, concurrency: {CONCURRENCY}, seconds: 1.5, pause: 0.05, attempts: 12}}\n",
        encoding="utf-8",
    )
    command = [sys.executable, "-m", "tongwen", "run", str(recipe)]
    done, in_flight = 0, 0
    while done < kills:
        before = len(faults.log)
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        enough = before + rng.randrange(1, 12)
        while len(faults.log) < enough and process.poll() is None:
            time.sleep(0.002)
        time.sleep(rng.random() * 0.1)
        if process.poll() is not None:
            break  # it ended before the kill
        in_flight += faults.running
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        done += 1
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    made = [json.loads(line) for line in (folder / "out/synthesize/dialogues.jsonl").read_text("utf-8").splitlines()]
    journal = (folder / "out/synthesize/journal.jsonl").read_text("utf-8").splitlines()
    wanted = {json.loads(answer(prompt))["items"][0]["instruction"] for prompt in faults.requests}
    questions = [row["messages"][0]["content"] for row in made]
    faults.close()
    return {
        "kills": done,
        "requests": len(faults.log),
        "faults": sum(fault != "" for _, _, fault, _ in faults.log),
        "answers_given": sum(faults.answered.values()),
        "answers_in_journal": len(journal),
        "rows": len(made),
        "rows_lost": rows - len(made),
        "rows_doubled": len(questions) - len(set(questions)),
        "rows_of_no_answer": len(set(questions) - wanted),
        "answers_paid_twice": sum(times - 1 for times in faults.answered.values() if times > 1),
        "most_in_flight": faults.most_running,
        "allowed_twice": done * CONCURRENCY,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=500)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = storm(Path(folder), args.rows, args.kills)
    print(json.dumps(found, indent=1))
    if args.out:
        args.out.write_text(json.dumps({"seed": 0, "concurrency": CONCURRENCY, **found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
