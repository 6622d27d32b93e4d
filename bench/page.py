"""Load test of the web page: delay between the model's first words and the page's, then 16 visitors at once, a third of whom
leave during an answer: no question is lost, and memory does not grow.

    python bench/page.py --model SMOLLM2_FOLDER --out bench/results/page.json

The first figure is taken in Chromium: from the Enter key to the frame that shows the first words, less the time that the
model took for them in the same answer. The second uses the page's protocol: a visitor opens the page, asks again and again for
at most 16 new tokens, and closes the page during one answer of three. Every other question must be answered or refused.
"""

from __future__ import annotations

import argparse
import json
import platform
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
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
from serve_load import held_by

VISITORS, TOKENS, ROUNDS, ASKED = 16, 16, 3, 20
GUESTS = 100  # visitors who leave without a question before the rounds; more than the page keeps in memory
PATIENCE = 300  # seconds without data from the server, after which a question counts as lost
# Record when Enter is pressed, and the frame that first shows words of the answer.
WATCH = """() => {
    addEventListener("keydown", event => { if (event.key === "Enter") window.asked = {pressed: performance.now()} }, true);
    new MutationObserver(() => {
        const answer = document.querySelector("#board0 .bot .message-content");
        if (window.asked && !window.asked.shows && answer && answer.innerText.trim()) {
            window.asked.shows = true;
            requestAnimationFrame(() => { window.asked.seen = performance.now() });
        }
    }).observe(document.body, {subtree: true, childList: true, characterData: true});
}"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--seconds", type=float, default=180)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    command = [sys.executable, "-m", "tongwen", "chat", args.model, "--web", "--port", "0", "--json"]
    page = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert page.stdout
    url, _, token = json.loads(page.stdout.readline())["url"].partition("/?token=")
    watched = psutil.Process(page.pid)
    try:
        first = first_words(url, token)
        print(first, flush=True)
        # First use loads and caches; the page also keeps a bounded number of sessions. Neither counts as growth.
        open_and_leave(url, token)
        visits(url, token, args.model, args.seconds, seed=0)
        rounds = []
        for number in range(1, ROUNDS + 1):
            became = visits(url, token, args.model, args.seconds, number)
            rounds.append({"became": dict(became), **held_by(watched)})
            print(rounds[-1], flush=True)
    finally:
        page.terminate()
    result = {
        "model": Path(args.model).name,
        "first_words": first,
        "visitors": VISITORS,
        "new_tokens": TOKENS,
        "seconds_per_round": args.seconds,
        "rounds": rounds,
        "exit_code": page.wait(),
        "cores": len(psutil.Process().cpu_affinity()),
        "load_average": round(psutil.getloadavg()[2], 1),
        "python": platform.python_version(),
    }
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


# -- first words ---------------------------------------------------------------------------------------------------


def first_words(url: str, token: str) -> dict[str, Any]:
    """Measure seconds until the page shows the first words, until the model has generated them, and the difference.

    ASKED answers are measured, after one for warm-up.
    """
    from playwright.sync_api import sync_playwright

    seen, own = [], []
    with sync_playwright() as started:
        browser = started.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        version = browser.version
        page = browser.new_page()
        page.set_default_timeout(PATIENCE * 1000)
        page.goto(f"{url}/en/?token={token}")
        page.wait_for_selector("#question textarea")
        page.evaluate(WATCH)
        for _ in range(1 + ASKED):
            page.fill("#question textarea", "Say hello in one short sentence.")
            page.press("#question textarea", "Enter")
            page.wait_for_selector(".stop-button")
            page.wait_for_selector(".submit-button")
            asked = page.evaluate("() => window.asked")
            seen.append((asked["seen"] - asked["pressed"]) / 1000)
            own.append(float(re.findall(r"first words after ([\d.]+) s", page.locator("#pace0").inner_text())[0]))
            page.click("#fresh")
            page.wait_for_selector("#board0 .bot", state="detached")
        browser.close()
    later = [shown - generated for shown, generated in zip(seen[1:], own[1:], strict=True)]
    return {
        "chromium": version,
        "answers": ASKED,
        "on_the_page_seconds": round(statistics.median(seen[1:]), 3),
        "the_models_own_seconds": round(statistics.median(own[1:]), 3),
        "later_seconds": {"median": round(statistics.median(later), 3), "most": round(max(later), 3)},
    }


# -- many visitors -------------------------------------------------------------------------------------------------


def open_and_leave(url: str, token: str) -> None:
    for _ in range(GUESTS):
        with opened(url, token) as visitor:
            visitor.type("?")


def visits(url: str, token: str, model: str, seconds: float, seed: int) -> Counter[str]:
    """Let VISITORS ask for `seconds`; count the outcomes of their questions."""
    until = time.monotonic() + seconds
    found: Counter[str] = Counter()

    def work(number: int) -> None:
        rng = random.Random(seed * 1000 + number)
        while time.monotonic() < until:
            try:
                with opened(url, token) as visitor:
                    while (became := visitor.ask(model, rng)) != "left" and time.monotonic() < until:
                        found[became] += 1
                    found[became] += 1
            except httpx.HTTPError as error:
                found[f"{type(error).__name__}: {error}"] += 1

    threads = [threading.Thread(target=work, args=(number,)) for number in range(VISITORS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


class Visitor:
    """A client with the page open. events: the page's events from its configuration."""

    def __init__(self, web: httpx.Client, session: str, events: list[dict[str, Any]]) -> None:
        self.web, self.session = web, session
        self.box = next(one["id"] for one in events if one["targets"] and one["targets"][0][1] == "submit")
        self.answer = next(one["id"] for one in events if one["api_name"] == "ask")

    def ask(self, model: str, rng: random.Random) -> str:
        """Return the outcome of a question: answered, refused, left, or an error."""
        leaves_at = rng.randrange(2, 8) if rng.random() < 1 / 3 else 0
        typed = self.type(f"{rng.random()}: what is the capital of France?")
        if typed != "answered":
            return typed
        return self._call(self.answer, [None, [], [], False, model, model, "", TOKENS, 0, 1, 0, 1, None], leaves_at)

    def type(self, text: str) -> str:
        return self._send("run/predict", self.box, [text]) or "answered"

    def _send(self, route: str, event: int, given: list[Any]) -> str:
        """Send an event; return why it was not accepted, or an empty text."""
        body = {"data": given, "fn_index": event, "session_hash": self.session}
        response = self.web.post(f"/en/gradio_api/{route}", json=body)
        if response.status_code == 200:
            return ""
        time.sleep(1)
        return "refused" if response.status_code in (429, 503) else f"{response.status_code}: {response.text}"

    def _call(self, event: int, given: list[Any], leaves_at: int) -> str:
        """Send an event and read its answer. leaves_at: leave after this number of pieces; 0: never."""
        if problem := self._send("queue/join", event, given):
            return problem
        pieces = 0
        query = {"session_hash": self.session}
        with self.web.stream("GET", "/en/gradio_api/queue/data", params=query) as lines:
            for line in lines.iter_lines():
                event_data = json.loads(line[6:]) if line.startswith("data: ") else {}
                pieces += event_data.get("msg") == "process_generating"
                if leaves_at and pieces >= leaves_at:
                    return "left"
                if event_data.get("msg") == "process_completed":
                    return "answered" if event_data["success"] else f"failed: {event_data}"
        return "the stream ended before the answer"


@contextmanager
def opened(url: str, token: str) -> Iterator[Visitor]:
    """Open the page as a browser does, with a heartbeat until it is closed."""
    session = uuid.uuid4().hex
    headers = {"authorization": f"Bearer {token}", "origin": url}
    with (
        httpx.Client(base_url=url, headers=headers, timeout=PATIENCE) as web,
        web.stream("GET", f"/en/gradio_api/heartbeat/{session}"),
    ):
        yield Visitor(web, session, web.get("/en/config").json()["dependencies"])


if __name__ == "__main__":
    main()
