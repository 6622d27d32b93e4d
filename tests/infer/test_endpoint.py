"""Answers from an endpoint that is careless or hostile: the key and the prompts stay, and only whole answers count."""

from __future__ import annotations

import contextlib
import http.server
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("openai")

from tests.conftest import write_rows
from tongwen.core.openai_client import check_address
from tongwen.infer import endpoint

KEY = "sk-canary-4711-abcdef"
ROWS = [{"prompt": f"问题{number}"} for number in range(4)]


class Hostile(http.server.BaseHTTPRequestHandler):
    """Answers as its class attributes say; counts the requests that no test sends."""

    how = ""
    elsewhere: list[str] = []  # noqa: RUF012 (shared on purpose)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        asked = json.loads(body)["messages"][0]["content"]
        if self.path.startswith("/other"):
            self.elsewhere.append(body)
        if self.how == "redirect":
            self.send_response(307)
            self.send_header("Location", "/other/v1/chat/completions")
            self.end_headers()
            return
        finish, text, status = "stop", "答" + asked, 200
        if self.how in ("length", "content_filter") and asked == "问题2":
            finish = self.how
        if self.how == "echo":
            text = f"your key is {self.headers['Authorization']}"
        if self.how == "echo_error":
            status = 400
        self.send_response(status)
        self.send_header("Content-Type", "text/html" if self.how == "page" else "application/json")
        self.end_headers()
        if self.how == "echo_error":
            self.wfile.write(json.dumps({"error": {"message": f"bad: {self.headers['Authorization']}"}}).encode())
        elif self.how == "page":
            self.wfile.write(f"<html>{self.headers['Authorization']}".encode())
        elif self.how == "echo_json":
            self.wfile.write(json.dumps([self.headers["Authorization"]]).encode())
        elif self.how == "slow":
            while True:
                self.wfile.write(b" ")
                time.sleep(0.1)
        elif self.how == "endless":
            while True:
                self.wfile.write(b" " * (1 << 20))
        else:
            choice = {"index": 0, "finish_reason": finish, "message": {"role": "assistant", "content": text}}
            reply = {"id": "1", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice]}
            self.wfile.write(json.dumps(reply).encode())

    def handle(self) -> None:
        with contextlib.suppress(OSError):  # the client has left
            super().handle()

    def log_message(self, *arguments: Any) -> None: ...


@pytest.fixture
def url(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hostile)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setattr(endpoint, "RETRIES", 0)
    Hostile.elsewhere.clear()
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()
    server.server_close()


def generate(tongwen: Any, folder: Path, url: str, how: str) -> tuple[int, str, str]:
    """Return (exit code, all output and files, the answers)."""
    Hostile.how = how
    data, out = write_rows(folder / "data.jsonl", ROWS), folder / "out.jsonl"
    code, said, err = tongwen("generate", "--prompts", data, "--endpoint", url, "--model", "m", "--out", out)
    files = "".join(file.read_text(encoding="utf-8") for file in folder.iterdir() if file.is_file())
    return code, said + err + files, out.read_text(encoding="utf-8") if out.is_file() else ""


@pytest.mark.parametrize(
    ("how", "code", "said"),
    [
        ("redirect", 4, "307"),
        ("echo_error", 4, "bad: Bearer …"),
        ("echo_json", 4, "no answer"),
        ("page", 2, "web page"),
        ("slow", 5, "no whole reply within 1 seconds"),
        ("endless", 4, "8388608"),
        ("echo", 0, "your key is Bearer …"),
    ],
)
def test_key_and_prompts_are_sent_to_one_origin_only(
    how: str, code: int, said: str, url: str, tongwen: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if how == "slow":
        monkeypatch.setattr(endpoint, "SECONDS", 1.0)
    found, everything, _ = generate(tongwen, tmp_path, url, how)
    assert found == code and said in everything, everything
    assert KEY not in everything and "Traceback" not in everything
    assert Hostile.elsewhere == []


@pytest.mark.parametrize("how", ["length", "content_filter"])
def test_truncated_answer_is_an_error(how: str, url: str, tongwen: Any, tmp_path: Path) -> None:
    code, everything, answers = generate(tongwen, tmp_path, url, how)
    assert code == 4 and not answers and "1 answers are not whole; the first is that of prompt 3" in everything
    assert how in everything
    code, everything, answers = generate(tongwen, tmp_path, url, "")  # the same command asks for what is missing
    assert code == 0 and "3 answers already exist" in everything
    assert [json.loads(line)["answer"] for line in answers.splitlines()] == [f"答问题{number}" for number in range(4)]


@pytest.mark.parametrize(
    "address",
    ["http://example.com/v1", "http://10.0.0.7:8000/v1", "https://me:secret@example.com/v1", "http://[::1", "x"],
)
def test_key_is_refused_for_insecure_addresses(
    address: str, tongwen: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    code, everything, _ = generate(tongwen, tmp_path, address, "")
    assert code == 2 and "--endpoint" in everything and "https://HOST/v1" in everything
    assert KEY not in everything and "secret" not in everything


def test_server_without_a_key_may_be_on_another_machine() -> None:
    assert check_address("http://10.0.0.7:8000/v1", "--endpoint", has_key=False) == "http://10.0.0.7:8000/v1"


def test_key_with_a_line_break_is_not_printed(
    url: str, tongwen: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY + "\n")
    code, everything, _ = generate(tongwen, tmp_path, url, "")
    assert code in (0, 4, 5) and KEY not in everything
