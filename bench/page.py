"""The page under visitors: how much later than the model's own the first words stand there, and 16 clients at once.

python bench/page.py --model FOLDER [--seconds 60] [--out bench/results/page.json]

The first figure is taken in Chromium: from the Enter key to the first words on the page, less the time that the model took for
them in the same answer. The second speaks the page's protocol: each client asks for at most 16 tokens, a third of them leave in
the middle; three rounds, with the server's memory after each.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import statistics
import subprocess
import sys
import threading
import time
import uuid
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import psutil

TOKEN = "a-token-for-measuring"
CLIENTS, TOKENS, ROUNDS, ASKED = 16, 16, 3, 10


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--port", type=int, default=7869)
    parser.add_argument("--out", default="")
    given = parser.parse_args()
    url = f"http://127.0.0.1:{given.port}"
    command = [sys.executable, "-m", "tongwen", "chat", given.model, "--web", "--port", str(given.port)]
    server = subprocess.Popen(command, env={**os.environ, "TONGWEN_API_KEY": TOKEN}, stdout=subprocess.DEVNULL)
    try:
        wait_for(url)
        later = first_words(url)
        rounds = [round_of(url, given.model, given.seconds, server.pid) for _ in range(ROUNDS)]
    finally:
        server.terminate()
        server.wait()
    found = {
        "model": Path(given.model).name,
        "load_average": os.getloadavg()[0],
        "first_words_later_seconds": {"median": statistics.median(later), "most": max(later)},
        "clients": CLIENTS,
        "seconds_per_round": given.seconds,
        "rounds": rounds,
    }
    print(json.dumps(found, indent=1))
    if given.out:
        Path(given.out).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def wait_for(url: str) -> None:
    for _ in range(600):
        try:
            httpx.get(url)
            return
        except httpx.HTTPError:
            time.sleep(0.5)


def first_words(url: str) -> list[float]:
    """Seconds between the model's first piece and its words on the page, for each of some answers."""
    from playwright.sync_api import sync_playwright

    later = []
    with sync_playwright() as started:
        browser = started.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page()
        page.set_default_timeout(120_000)
        page.goto(f"{url}/en/?token={TOKEN}")
        page.wait_for_selector("#question textarea")
        for _ in range(ASKED):
            page.click("#fresh")
            page.wait_for_selector("#board0 .bot", state="detached")
            page.fill("#question textarea", "Say hello in one short sentence.")
            began = time.monotonic()
            page.press("#question textarea", "Enter")
            page.wait_for_selector("#board0 .bot .message-content")
            seen = time.monotonic() - began
            pace = page.locator(".pace", has_text="first words").first
            pace.wait_for()
            own = re.search(r"after ([\d.]+) s", pace.inner_text())
            assert own
            later.append(seen - float(own[1]))
        browser.close()
    return later


def round_of(url: str, model: str, seconds: float, server: int) -> dict[str, Any]:
    """What became of the questions of all clients."""
    outcomes: Counter[str] = Counter()
    ends = time.monotonic() + seconds
    threads = [threading.Thread(target=visit, args=(url, model, number, ends, outcomes)) for number in range(CLIENTS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return {"outcomes": dict(outcomes), "server_rss_bytes": psutil.Process(server).memory_info().rss}


def visit(url: str, model: str, number: int, ends: float, outcomes: Counter[str]) -> None:
    rng = random.Random(number)
    with httpx.Client(base_url=url, headers={"authorization": f"Bearer {TOKEN}", "origin": url}, timeout=300) as web:
        events = web.get("/en/config").json()["dependencies"]
        box = next(one["id"] for one in events if one["targets"] and one["targets"][0][1] == "submit")
        answer = next(one["id"] for one in events if one["api_name"] == "ask")
        while time.monotonic() < ends:
            session = uuid.uuid4().hex
            asked = f"Question {rng.randrange(1000)}: what is {rng.randrange(100)} + {rng.randrange(100)}?"
            values = [None, [], [], False, model, model, "", TOKENS, 0, 1, 0, 1, None]
            outcome = call(web, session, box, [asked], leave=False)
            outcomes[
                outcome if outcome != "answered" else call(web, session, answer, values, leave=number % 3 == 0)
            ] += 1


def call(web: httpx.Client, session: str, event: int, given: list[Any], *, leave: bool) -> str:
    joined = web.post("/en/gradio_api/queue/join", json={"data": given, "fn_index": event, "session_hash": session})
    if joined.status_code != 200:
        return "refused" if joined.status_code in (429, 503) else f"failed {joined.status_code}"
    pieces = 0
    with web.stream("GET", "/en/gradio_api/queue/data", params={"session_hash": session}) as lines:
        for line in lines.iter_lines():
            told = json.loads(line[6:]) if line.startswith("data: ") else {}
            pieces += told.get("msg") == "process_generating"
            if leave and pieces > 2:
                return "left"
            if told.get("msg") == "process_completed":
                return "answered" if told["success"] else "failed"
    return "ended early"


if __name__ == "__main__":
    main()
