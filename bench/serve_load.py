"""Load test of `tongwen serve`: sixteen clients at once, a third of the requests aborted; none is lost, memory does not grow.

    python bench/serve_load.py --model SMOLLM2_FOLDER --out bench/results/serve_load.json

Each client asks again and again for at most 16 new tokens, streamed or whole. A third of the requests are aborted at a
random moment: while they wait, or after some pieces. Every other one must be answered, or refused with 429.
"""

from __future__ import annotations

import argparse
import http.client
import json
import random
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import psutil

CLIENTS, TOKENS = 16, 16


def one_request(port: int, token: str, rng: random.Random) -> str:
    """Send a request; return its outcome: answered, streamed, refused, left, or an error."""
    stream, leaves = rng.random() < 0.5, rng.random() < 1 / 3
    messages = [{"role": "user", "content": f"{rng.random()}: what is the capital of France?"}]
    body = json.dumps({"model": "m", "messages": messages, "max_tokens": TOKENS, "stream": stream})
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=300)
    try:
        connection.request("POST", "/v1/chat/completions", body, {"Authorization": f"Bearer {token}"})
        if leaves and not stream:
            time.sleep(rng.random())
            return "left"
        answer = connection.getresponse()
        if answer.status == 429:
            time.sleep(min(float(answer.getheader("Retry-After", "1")), 2))
            return "refused"
        if leaves:
            answer.read(rng.randrange(1, 600))
            return "left"
        text = answer.read().decode()
        whole = text.endswith("data: [DONE]\n\n") if stream else '"finish_reason"' in text
        return ("streamed" if stream else "answered") if answer.status == 200 and whole else f"{answer.status}: {text}"
    finally:
        if connection.sock:
            connection.sock.shutdown(socket.SHUT_RDWR)
        connection.close()


def load(port: int, token: str, seconds: float, clients: int = CLIENTS, seed: int = 0) -> Counter[str]:
    """Let `clients` clients send requests for `seconds`; count the outcomes."""
    until = time.monotonic() + seconds
    found: Counter[str] = Counter()

    def work(number: int) -> None:
        rng = random.Random(seed * 1000 + number)
        while time.monotonic() < until:
            try:
                found[one_request(port, token, rng)] += 1
            except OSError as error:
                found[f"{type(error).__name__}: {error}"] += 1

    threads = [threading.Thread(target=work, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--seconds", type=float, default=180)
    parser.add_argument("--queue", type=int, default=12)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    serve = [sys.executable, "-m", "tongwen", "serve", args.model, "--name", "m", "--port", "0", "--json"]
    process = subprocess.Popen([*serve, "--queue", str(args.queue)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert process.stdout
    opened = json.loads(process.stdout.readline())
    port = int(opened["url"].split(":")[2].split("/")[0])
    watched = psutil.Process(process.pid)
    load(port, opened["token"], args.seconds)  # warm-up: loading and caching at first use is no growth
    rounds = []
    for number in range(3):
        became = load(port, opened["token"], args.seconds, seed=number + 1)
        rounds.append({"became": dict(became), **held_by(watched)})
        print(rounds[-1], flush=True)
    process.terminate()
    result = {
        "clients": CLIENTS,
        "new_tokens": TOKENS,
        "queue": args.queue,
        "seconds_per_round": args.seconds,
        "rounds": rounds,
        "exit_code": process.wait(),
        "cpu": "two cores, shared",
    }
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def held_by(process: psutil.Process) -> dict[str, float]:
    return {
        "rss_mb": round(process.memory_info().rss / 1e6, 1),
        "open_files": process.num_fds(),
        "threads": process.num_threads(),
    }


if __name__ == "__main__":
    main()
