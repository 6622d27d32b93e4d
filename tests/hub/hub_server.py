"""A hub on this machine, with the faults of a real one."""

from __future__ import annotations

import hashlib
import http.server
import json
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

from tongwen.hub import transfer

CANARY = "hf_canaryCanaryCANARY0123456789abcdef"
COMMIT = "c0ffee" + "0" * 34
ROWS = [{"instruction": f"问{n}", "input": "", "output": f"答{n}。" * (n % 7)} for n in range(200)]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()
WEIGHTS = bytes(range(256)) * 4000  # about 1 MB
DATA, MODEL = "BelleGroup/train_1M_CN", "tiny/model"


def git_hash(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@dataclass
class Repo:
    files: dict[str, bytes]
    large: tuple[str, ...] = ()
    commit: str = COMMIT
    id: str = ""  # the name that it has now
    claims: dict[str, dict[str, Any]] = field(default_factory=dict)  # lies in the listing

    def info(self, id_: str) -> dict[str, Any]:
        siblings = []
        for path, content in self.files.items():
            one: dict[str, Any] = {"rfilename": path, "size": len(content), "blobId": git_hash(content)}
            if path in self.large:
                sha256 = hashlib.sha256(content).hexdigest()
                one["lfs"] = {"sha256": sha256, "size": len(content), "pointerSize": 130}
            siblings.append(one | self.claims.get(path, {}))
        return {"id": self.id or id_, "sha": self.commit, "siblings": siblings}


class Hub(http.server.ThreadingHTTPServer):
    """The hub's API and downloads for a few repositories. `faults`: what is to happen, one per request that fits."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.repos: dict[tuple[str, str], Repo] = {}
        self.faults: list[tuple[str, str]] = []  # (part of the path, fault)
        self.log: list[dict[str, Any]] = []
        self.release = threading.Event()

    def requests_to(self, part: str) -> list[dict[str, Any]]:
        return [one for one in self.log if part in one["path"]]

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that goes away is no news."""


class Handler(http.server.BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: Any) -> None:
        return

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        entry = {"path": path, "range": self.headers.get("Range"), "auth": self.headers.get("Authorization"), "sent": 0}
        self.server.log.append(entry)
        fault = next((one for one in self.server.faults if one[0] in path), None)
        if fault:
            self.server.faults.remove(fault)
        what = fault[1] if fault else ""
        if what.isdigit():
            return self.answer(int(what), b"no", {"Retry-After": "7"} if what == "429" else {})
        if what.startswith("error:"):  # error:STATUS:CODE, and a body that repeats the secret
            _, status, code = what.split(":")
            body = f"you sent {entry['auth']}".encode()
            return self.answer(int(status), body, {"X-Error-Code": code, "X-Error-Message": body.decode()})
        if what == "page":
            return self.answer(200, b"<html>please log in</html>", {"Content-Type": "text/html; charset=utf-8"})
        if match := re.fullmatch(r"/api/(dataset|model)s/([^/]+/[^/]+)(?:/revision/(.+))?", path):
            repo = self.server.repos.get((match[1], match[2]))
            if repo is None or match[3] not in (None, "main", repo.commit):
                return self.answer(404, b"", {"X-Error-Code": "RepoNotFound" if repo is None else "RevisionNotFound"})
            return self.answer(200, json.dumps(repo.info(match[2])).encode(), {"Content-Type": "application/json"})
        match = re.fullmatch(r"/(cdn/)?(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        repo = self.server.repos.get(("dataset" if match[2] else "model", match[3])) if match else None
        if repo is None or match is None or match[5] not in repo.files or match[4] != repo.commit:
            return self.answer(404, b"", {"X-Error-Code": "EntryNotFound"})
        if what == "redirect":
            other = self.server.url.replace("127.0.0.1", "localhost")  # another origin, as a CDN is
            return self.answer(302, b"", {"Location": f"{other}/cdn{path}"})
        return self.send_file(repo.files[match[5]], what, entry)

    def send_file(self, content: bytes, what: str, entry: dict[str, Any]) -> None:
        if what == "wrong":
            content = content[:-1] + bytes([content[-1] ^ 1])
        if what == "more":
            content += b"more"
        start, status = 0, 200
        if (range_match := re.fullmatch(r"bytes=(\d+)-", entry["range"] or "")) and what != "no ranges":
            start, status = int(range_match[1]), 206
        body = content[start:]
        claimed = {"too long": len(body) + 100, "too short": len(body) // 2}.get(what, len(body))
        self.send_response(status)
        self.send_header("Content-Length", str(claimed))
        if status == 206:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        cut = len(body) // 2 if what in ("broken", "stalled") else min(len(body), claimed)
        self.wfile.write(body[:cut])
        self.wfile.flush()
        entry["sent"] = cut
        if what == "stalled":
            self.server.release.wait(20)
        if cut < claimed:
            self.close_connection = True

    def answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture()
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """A hub with one data set and one model, and this process on line to it, without waits between tries."""
    from huggingface_hub import constants
    from huggingface_hub.utils import close_session

    one = Hub()
    one.repos["dataset", DATA] = Repo(
        {
            ".gitattributes": b"*",
            "README.md": "说明".encode(),
            "Belle_open_source_1M.json": LINES,
            "load.py": b"import os",
        },
        ("Belle_open_source_1M.json",),
    )
    one.repos["model", MODEL] = Repo(
        {
            "config.json": b'{"model_type": "llama"}',
            "model.safetensors": WEIGHTS,
            "pytorch_model.bin": b"pickle",
            "training_args.bin": b"pickle",
            "modeling_tiny.py": b"raise SystemExit",
            "tf_model.h5": b"h5",
        },
        ("model.safetensors", "pytorch_model.bin"),
    )
    thread = threading.Thread(target=one.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy", "RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_ENDPOINT", one.url)
    monkeypatch.setenv("HF_TOKEN", CANARY)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(transfer, "WAITS_SECONDS", (0.0,) * 4)
    monkeypatch.chdir(tmp_path)
    close_session()
    yield one
    close_session()
    one.release.set()
    one.shutdown()
    one.server_close()
