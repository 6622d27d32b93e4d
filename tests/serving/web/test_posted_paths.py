"""Every route of the page, as the page itself lists them, gets foreign paths at every input: nothing is read, fetched,
written, started or ended."""

from __future__ import annotations

import html
import http.server
import json
import platform
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")

import httpx

from tests.conftest import byte_level_tokenizer, tiny_llama, write_recipe
from tests.serving.web.page_server import Parrot, client, make_chat_backend, serving
from tongwen.commands.web import make_backend
from tongwen.core import allowed_paths
from tongwen.serving.web.api import routes
from tongwen.serving.web.backend import PageBackend
from tongwen.workflows import workspace as workspace_module
from tongwen.workflows.workspace import Workspace

SENTINEL = "SENTINEL-4711"
WATCHED = {"open", "os.kill", "os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.truncate", "subprocess.Popen"}


class Watch:
    """What the interpreter did while it was on: files of the foreign folder that were opened; processes started or ended."""

    def __init__(self) -> None:
        self.on, self.foreign = False, ""
        self.seen: list[str] = []
        sys.addaudithook(self._hook)

    def _hook(self, event: str, args: tuple[Any, ...]) -> None:
        if self.on and event in WATCHED:
            paths = [str(one) for one in args if isinstance(one, (str, bytes, Path))]
            started = event == "subprocess.Popen" and "tongwen" in str(args)
            if event == "os.kill" or started or any(self.foreign in path for path in paths):
                self.seen.append(f"{event} {args}")


WATCH = Watch()


@pytest.fixture(scope="module")
def fetched() -> Iterator[list[str]]:
    """The requests to a server of this machine, whose address is `fetched[0]`."""
    requests: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            requests.append(self.path)
            self.send_response(200)
            self.end_headers()
            self.wfile.write(SENTINEL.encode())

        def log_message(self, *args: Any) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        requests.append(f"http://127.0.0.1:{server.server_port}")
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield requests
        server.shutdown()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Folders `page` (named), `foreign` (a run, a model, a recipe, data and a report, each with the sentinel), `uploads`."""
    top = tmp_path_factory.mktemp("place")
    tokenizer = byte_level_tokenizer(top / "page" / "base")
    tiny_llama(top / "page" / "base", len(tokenizer))
    write_recipe(top / "page", top / "page" / "base")
    foreign = top / "foreign"
    foreign.mkdir()
    sleeper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    for name in (
        "data.jsonl",
        "config.json",
        "tokenizer.json",
        "chat_template.jinja",
        "report.html",
        "run.log",
        ".env",
    ):
        (foreign / name).write_text(json.dumps({"text": SENTINEL, "model_type": "llama"}) + "\n", encoding="utf-8")
    (foreign / "recipe.yaml").write_text(f"name: x\nbase: {SENTINEL}\nout: {foreign}\n", encoding="utf-8")
    lock = f"{platform.node()}, process {sleeper.pid}, since now"
    (foreign / ".lock").write_text(lock, encoding="utf-8")
    (top / "page" / "link").symlink_to(foreign)
    hidden = top / "page" / ".hidden"
    hidden.mkdir()
    (hidden / "recipe.yaml").write_text(f"name: x\nbase: {SENTINEL}\n", encoding="utf-8")
    (top / "page" / "inside.txt").write_text(SENTINEL, encoding="utf-8")
    (top / "uploads").mkdir()
    (top / "home").mkdir()
    (top / "home" / "data.jsonl").write_text(json.dumps({"text": SENTINEL}), encoding="utf-8")
    yield top
    alive = sleeper.poll() is None
    sleeper.kill()
    sleeper.wait()
    assert alive, "a process that has nothing to do with tongwen was ended"


@pytest.fixture(scope="module")
def page(place: Path) -> PageBackend:
    workspace = Workspace.of([str(place / "page")], uploads=str(place / "uploads"))
    return make_backend(workspace, make_chat_backend(Parrot(), "parrot", "second"))


@pytest.fixture(scope="module")
def address(page: PageBackend) -> Iterator[str]:
    with serving(page) as url:
        yield url


def foreign_paths(place: Path, server: str) -> list[str]:
    foreign = place / "foreign"
    return [
        str(foreign / "data.jsonl"),
        str(foreign / "recipe.yaml"),
        str(foreign / "report.html"),
        str(foreign),
        f"{place}/page/../foreign/recipe.yaml",
        f"{place}/page/link/recipe.yaml",
        f"{place}/page/link",
        f"{place}/page/link/report.html",
        f"{place}/page/.hidden/recipe.yaml",
        f"{place}/page/inside.txt",
        f"{place}/uploads/../foreign/data.jsonl",
        f"/proc/self/root{foreign}/data.jsonl",
        "/proc/self/environ",
        f"file://{foreign}/data.jsonl",
        f"{server}/data.jsonl",
        f"{foreign}/data.jsonl\0.txt",
        f"{foreign}/*",
        "x" * 5000,
        "~/data.jsonl",
    ]


def bodies(place: Path) -> dict[str, dict[str, Any]]:
    """What the page posts to each route; names of models, recipes and runs are real."""
    base = f"{place}/page/base"
    question = {"model": "parrot", "system": "", "messages": [{"role": "user", "content": "你好"}], "sampling": {}}
    return {
        "chat": question,
        "inspect": {"file": f"{place}/uploads/a.jsonl", "model": base, "template": "chatml"},
        "vocabulary": {"base": base, "other": base, "text": "你好"},
        "start": {"recipe": f"{place}/page/recipe.yaml", "changes": ""},
        "stop": {"run": f"{place}/page"},
        "resume": {"run": f"{place}/page"},
        "compare": {"runs": [f"{place}/page"]},
    }


def forms(field: str, value: Any, path: str) -> list[Any]:
    """The forms in which a path can be posted in this field."""
    file = {"path": path, "url": path, "meta": {"_type": "FileData"}}
    if field == "messages":
        return [[{"role": "user", "content": content}] for content in (path, [{"type": "file", "file": file}])]
    if field == "changes":
        own = path.endswith("/page/inside.txt")  # a recipe may read this one
        named = [] if own else [f"prepare.documents={path}", f"sft.template={path} base={path}"]
        return [*named, f"out={path}", path]
    return [[path], [path, path], [*value, path], path] if isinstance(value, list) else [path, [path], file]


QUERIES = ("recipe", "run")  # routes that take a name in the address


def shows(answer: str) -> bool:
    """Whether an answer shows the sentinel, also as tokens in tags of their own, or in a page within a page."""
    text = answer.encode().decode("unicode_escape", "replace")
    for _ in range(3):
        if SENTINEL in text or SENTINEL in answer:
            return True
        text = html.unescape(re.sub(r"<[^>]*>", "", text))
    return False


def state_of(folder: Path) -> list[tuple[str, float, bytes]]:
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return [(str(file), file.stat().st_mtime, file.read_bytes()) for file in files]


@pytest.mark.sample("en")
@pytest.mark.parametrize("language", ["en", "zh"])
def test_no_function_reads_a_foreign_path(
    language: str, address: str, page: PageBackend, place: Path, fetched: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(place / "home"))
    paths = foreign_paths(place, fetched[0])
    before = state_of(place / "foreign"), state_of(place / "page")
    WATCH.foreign, WATCH.seen, WATCH.on = f"{place}/foreign", [], True
    tried: dict[str, int] = {}
    try:
        with client(address) as web:
            listed = {one.path.rpartition("/")[2] for one in routes(page) if one.path.startswith(f"/{language}/api/")}
            asked = bodies(place)
            assert listed == {*asked, *QUERIES, "state", "upload"}, "a new route needs its bodies here"
            for path in paths:
                for name in QUERIES:
                    answer = web.get(f"/{language}/api/{name}", params={"name": path}).text
                    assert not shows(answer), (name, path)
                for name, body in asked.items():
                    for field, value in body.items():
                        for form in forms(field, value, path):
                            answer = web.post(f"/{language}/api/{name}", json={**body, field: form}).text
                            assert not shows(answer), (name, field, form)
                            tried[f"{name}.{field}"] = tried.get(f"{name}.{field}", 0) + 1
    finally:
        WATCH.on = False
    opened = [seen for seen in WATCH.seen if "uploads" not in seen]
    assert not opened, opened[:5]
    assert len(fetched) == 1, fetched
    assert (state_of(place / "foreign"), state_of(place / "page")) == before
    assert len(tried) >= 12 and min(tried.values()) >= len(paths), tried


def test_uploads_and_reports_are_confined(address: str, place: Path) -> None:
    before = state_of(place / "page"), state_of(place / "foreign")
    with client(address) as web:
        for name in ("../../page/base/config.json", f"{place}/page/x.jsonl", "..\\x", ".env", "a\0b", "/", "x" * 300):
            answer = web.post("/en/api/upload", params={"name": name}, content=b"{}")
            assert Path(answer.json()["file"]).parent == place / "uploads", name
        for path in foreign_paths(place, "http://127.0.0.1:9"):
            answer = web.get("/report", params={"name": path})
            assert answer.status_code == 404 and SENTINEL not in answer.text
    assert (state_of(place / "page"), state_of(place / "foreign")) == before
    assert not [file for file in place.iterdir() if file.name not in ("page", "foreign", "uploads", "home")]


def upload(web: httpx.Client, text: str) -> str:
    row = json.dumps({"instruction": "问", "output": text})
    return str(web.post("/en/api/upload", params={"name": "a.jsonl"}, content=row.encode()).json()["file"])


def inspected(web: httpx.Client, file: str, place: Path) -> str:
    return web.post("/en/api/inspect", json={**bodies(place)["inspect"], "file": file}).text


def test_uploaded_file_is_read_from_the_uploads_only(address: str, place: Path) -> None:
    with client(address) as web:
        file = upload(web, SENTINEL)
        assert Path(file).is_relative_to(place / "uploads")
        assert shows(inspected(web, file, place))
        for other in (f"{address}/en/api/upload?file={file}", f"file://{file}", f"{place}/page/inside.txt"):
            assert not shows(inspected(web, other, place))


def test_without_the_gate_the_foreign_file_is_read(address: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The test above can fail: no rule of the toolkit protects the file."""

    def anywhere(folders: Any, name: str) -> Path:
        return Path(name)

    file = place / "foreign" / "rows.jsonl"
    file.write_text(json.dumps({"instruction": "问", "output": SENTINEL}) + "\n", encoding="utf-8")
    with client(address) as web:
        assert not shows(inspected(web, str(file), place))
        for module in (allowed_paths, workspace_module):
            monkeypatch.setattr(module, "resolve_inside", anywhere)
        assert shows(inspected(web, str(file), place))
    file.unlink()
