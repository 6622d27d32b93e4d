"""A local endpoint that fails on demand, and records requests and answers.

`Faults(plan)` serves OpenAI's streamed chat completions. plan: (prompt, how often it was asked before) -> the name of a
fault, or "" for an answer. `answer(prompt)` returns the text of the answer.
"""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Plan = Callable[[str, int], str]


class Faults:
    def __init__(self, plan: Plan, answer: Callable[[str], str], seconds: float = 0.0) -> None:
        self.plan, self.answer, self.seconds = plan, answer, seconds
        self.lock = threading.Lock()
        self.requests: Counter[str] = Counter()  # requests by prompt
        self.answered: Counter[str] = Counter()  # whole answers by prompt
        self.log: list[tuple[float, str, str, dict[str, Any]]] = []  # time, prompt, fault, headers
        self.bodies: list[dict[str, Any]] = []
        self.running = self.most_running = 0
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        faults = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                sent = self.rfile.read(int(self.headers["Content-Length"]))
                if len(sent) < int(self.headers["Content-Length"]):
                    return  # the client was killed while sending
                body = json.loads(sent)
                prompt = body["messages"][0]["content"]
                with faults.lock:
                    fault = faults.plan(prompt, faults.requests[prompt])
                    faults.requests[prompt] += 1
                    faults.log.append(
                        (time.monotonic(), prompt, fault, {name.lower(): value for name, value in self.headers.items()})
                    )
                    faults.bodies.append(body)
                    faults.running += 1
                    faults.most_running = max(faults.running, faults.most_running)
                try:
                    time.sleep(faults.seconds)
                    _respond(self, fault, faults.answer(prompt))
                    if not fault:
                        with faults.lock:
                            faults.answered[prompt] += 1
                except OSError:
                    pass  # the client has gone
                finally:
                    with faults.lock:
                        faults.running -= 1

            def log_message(self, *_: Any) -> None:
                pass

        return Handler


def _respond(http: BaseHTTPRequestHandler, fault: str, text: str) -> None:
    """Send an answer or a fault: a status with an optional Retry-After ("429 2"), html, sleep, drip, broken, cut, no_finish, no_usage, length,
    content_filter, large, packed, redirect URL, quota, shape."""
    kind, _, argument = fault.partition(" ")
    if kind.isdigit() or kind == "quota":
        error = {"error": {"message": "no", "code": "insufficient_quota" if kind == "quota" else None}}
        if argument.startswith("response_format"):
            error["error"]["message"] = argument
        headers = {"Retry-After": argument} if kind == "429" and argument else {}
        return _send(http, 429 if kind == "quota" else int(kind), "application/json", json.dumps(error), headers)
    if kind == "html":
        return _send(http, 200, "text/html", "<html>log in</html>", {})
    if kind == "redirect":
        return _send(http, 307, "text/plain", "", {"Location": argument})
    if kind == "sleep":
        time.sleep(float(argument))
    http.send_response(200)
    http.send_header("Content-Type", "text/event-stream")
    if kind == "packed":
        http.send_header("Content-Encoding", "gzip")
    http.end_headers()
    pieces = [text[place : place + 40] for place in range(0, len(text), 40)]
    for number, piece in enumerate(pieces):
        if kind == "cut" and number >= len(pieces) // 2:
            return None
        if kind == "broken" and number == len(pieces) // 2:
            http.wfile.write(b'data: {"choices": [{"delta": {"con\n\n')
        if kind == "shape":
            http.wfile.write(b'data: {"choices": null}\n\n')
        if kind == "drip":
            time.sleep(float(argument))
        _event(http, {"choices": [{"index": 0, "delta": {"content": piece}, "finish_reason": None}]})
    if kind == "large":
        for _ in range(300):
            http.wfile.write(b": " + b"x" * 65536 + b"\n")
    if kind in ("no_finish", "cut"):
        return None
    finish = kind if kind in ("length", "content_filter") else "stop"
    _event(http, {"choices": [{"index": 0, "delta": {}, "finish_reason": finish}]})
    if kind != "no_usage":
        usage = {"prompt_tokens": 100, "completion_tokens": 50, "total_tokens": 150}
        _event(http, {"choices": [], "usage": usage})
    http.wfile.write(b"data: [DONE]\n\n")
    return None


def _event(http: BaseHTTPRequestHandler, value: dict[str, Any]) -> None:
    whole = {"id": "x", "object": "chat.completion.chunk", "created": 0, "model": "m", **value}
    http.wfile.write(f"data: {json.dumps(whole, ensure_ascii=False)}\n\n".encode())
    http.wfile.flush()


def _send(http: BaseHTTPRequestHandler, status: int, kind: str, text: str, headers: dict[str, str]) -> None:
    http.send_response(status)
    for name, value in {"Content-Type": kind, "Content-Length": str(len(text)), **headers}.items():
        http.send_header(name, value)
    http.end_headers()
    http.wfile.write(text.encode())
