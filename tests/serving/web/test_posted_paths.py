"""Every function of the page, as the page itself lists them, gets foreign paths at every input: nothing is read, fetched,
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
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("gradio")

import httpx

from tests.conftest import byte_level_tokenizer, tiny_llama, write_recipe
from tests.serving.web.page_server import Parrot, client, make_chat_backend, serving
from tongwen.commands.web import make_backend
from tongwen.core import allowed_paths
from tongwen.serving.web import posted
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
def address(place: Path) -> Iterator[str]:
    workspace = Workspace.of([str(place / "page")], uploads=str(place / "uploads"))
    with serving(make_backend(workspace, make_chat_backend(Parrot(), "parrot", "second"))) as url:
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


def posts(kind: str, path: str) -> list[Any]:
    """What can be posted to a component of this kind."""
    file = {"path": path, "meta": {"_type": "gradio.FileData"}, "orig_name": "a.jsonl"}
    part = {"type": "component", "component": "file", "value": file, "constructor_args": {"value": path}, "props": {}}
    spoken: list[list[dict[str, Any]]] = [
        [{"role": "user", "content": content}]
        for content in (
            [{"type": "text", "text": path}],
            [{"type": "file", "file": file}],
            [part],
            [{**part, "component": "code", "value": "", "constructor_args": {"value": [path]}}],
        )
    ]
    return {
        "file": [file, {**file, "url": path}, {**file, "is_stream": True}, [file], path],
        "chatbot": spoken,
        "dropdown": [path, [path], file],
        "textbox": [path, f"prepare.documents={path}", f"out={path}", f"sft.template={path} base={path}", file],
        "code": [path],
        "markdown": [path],
        "browserstate": [[{"number": 1, "title": path, "system": path, "boards": [board, []]}] for board in spoken],
    }.get(kind, [])


def usual(component: dict[str, Any], place: Path) -> Any:
    """What the page posts for a component that is not attacked; names of models, recipes and runs are real."""
    names = {"recipe": f"{place}/page/recipe.yaml", "run": f"{place}/page", "template": "chatml", "others": []}
    kind, props = component["type"], component["props"]
    if kind == "dropdown":
        return names.get(props.get("elem_id"), f"{place}/page/base")
    return {"chatbot": [], "browserstate": [], "checkbox": False, "textbox": "你好"}.get(kind, props.get("value"))


def post(web: httpx.Client, language: str, function: dict[str, Any], data: list[Any]) -> str:
    """All that the server answers to an event, its stream included."""
    session = uuid.uuid4().hex
    event = {"index": 0, "value": data[0] if data else "", "previous_value": ""}
    body = {"data": data, "fn_index": function["id"], "session_hash": session, "event_data": event, "trigger_id": None}
    if not function["queue"]:
        return web.post(f"/{language}/gradio_api/run/predict", json=body).text
    joined = web.post(f"/{language}/gradio_api/queue/join", json=body)
    if joined.status_code != 200:
        return joined.text
    text = ""
    with web.stream("GET", f"/{language}/gradio_api/queue/data", params={"session_hash": session}) as events:
        for line in events.iter_lines():
            text += line
            if "process_completed" in line or "close_stream" in line:
                break
    return text


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
    language: str, address: str, place: Path, fetched: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(place / "home"))
    paths = foreign_paths(place, fetched[0])
    before = state_of(place / "foreign"), state_of(place / "page")
    WATCH.foreign, WATCH.seen, WATCH.on = f"{place}/foreign", [], True
    tried: dict[int, int] = {}
    try:
        with client(address) as web:
            config = web.get(f"/{language}/config").json()
            components = {one["id"]: one for one in config["components"]}
            for function in config["dependencies"]:
                inputs = [components[number] for number in function["inputs"]]
                attacks = [
                    (number, form)
                    for number, component in enumerate(inputs)
                    for form in range(len(posts(component["type"], "")))
                ]
                # Every path, and every form at every input; not each with each.
                tried[function["id"]] = 0
                for turn in range(max(len(paths), len(attacks)) if attacks else 0):
                    (attacked, form), path = attacks[turn % len(attacks)], paths[turn % len(paths)]
                    data = [usual(one, place) for one in inputs]
                    data[attacked] = posts(inputs[attacked]["type"], path)[form]
                    answer = post(web, language, function, data)
                    assert not shows(answer), (function["api_name"], inputs[attacked]["type"], data[attacked])
                    tried[function["id"]] += 1
    finally:
        WATCH.on = False
    opened = [seen for seen in WATCH.seen if "uploads" not in seen]
    assert not opened, opened[:5]
    assert len(fetched) == 1, fetched
    assert (state_of(place / "foreign"), state_of(place / "page")) == before
    with_inputs = [count for number, count in tried.items() if count]
    assert len(with_inputs) >= 20 and min(with_inputs) >= 10, tried


def test_uploads_and_reports_are_confined(address: str, place: Path) -> None:
    before = state_of(place / "page"), state_of(place / "foreign")
    with client(address) as web:
        for name in ("../../page/base/config.json", f"{place}/page/x.jsonl", "..\\x", ".env", "a\0b", "/", "x" * 300):
            web.post("/en/gradio_api/upload", files={"files": (name, b"{}")})
        for path in foreign_paths(place, "http://127.0.0.1:9"):
            answer = web.get("/report", params={"name": path})
            assert answer.status_code == 404 and SENTINEL not in answer.text
    assert (state_of(place / "page"), state_of(place / "foreign")) == before
    assert not [file for file in place.iterdir() if file.name not in ("page", "foreign", "uploads", "home")]


def upload(web: httpx.Client, text: str) -> str:
    row = json.dumps({"instruction": "问", "output": text})
    return str(web.post("/en/gradio_api/upload", files={"files": ("a.jsonl", row.encode())}).json()[0])


def inspected(web: httpx.Client, file: dict[str, Any]) -> str:
    config = web.get("/en/config").json()
    dropped = next(one["id"] for one in config["components"] if one["props"].get("elem_id") == "dropped")
    function = next(one for one in config["dependencies"] if dropped in one["inputs"])
    base = next(one["props"]["value"] for one in config["components"] if one["id"] == function["inputs"][1])
    return post(web, "en", function, [file, base, "chatml"])


def test_uploaded_file_is_read_from_the_uploads_only(address: str, place: Path) -> None:
    with client(address) as web:
        file = upload(web, SENTINEL)
        given = {"path": file, "meta": {"_type": "gradio.FileData"}, "orig_name": "a.jsonl"}
        assert Path(file).is_relative_to(place / "uploads")
        assert shows(inspected(web, given))
        assert shows(inspected(web, {**given, "url": f"{address}/en/gradio_api/file={file}"}))
        for url in ("http://elsewhere/x", f"{address}.elsewhere/x", "file:///etc/passwd", 7):
            assert not shows(inspected(web, {**given, "url": url}))


def test_without_the_gate_the_foreign_file_is_read(address: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The test above can fail: no rule of the toolkit protects the file."""

    def anywhere(folders: Any, name: str) -> Path:
        return Path(name)

    file = place / "foreign" / "rows.jsonl"
    file.write_text(json.dumps({"instruction": "问", "output": SENTINEL}) + "\n", encoding="utf-8")
    given = {"path": str(file), "meta": {"_type": "gradio.FileData"}, "orig_name": "a.jsonl"}
    with client(address) as web:
        assert not shows(inspected(web, given))
        for module in (allowed_paths, posted, workspace_module):
            monkeypatch.setattr(module, "resolve_inside", anywhere)
        assert shows(inspected(web, given))
    file.unlink()


@pytest.mark.parametrize(
    "body",
    [
        b"{broken",
        b"[" * 200_000,
        b'{"a":' * 60 + b"1" + b"}" * 60,
        b'{"data": [' + b"9" * 5000 + b"]}",
        b'{"data": [{"component": "file"}]}',
        b'{"data": [[{"x": {"constructor_args": {}}}]]}',
        b'{"data": [{"path": 7}]}',
        b'{"data": [{"path": "/etc/passwd"}]}',
        b'{"data": [{"path": "\\ud800"}]}',
        b'{"data": [{"url": "http://127.0.0.1:9/"}]}',
        b"\xff\xfe",
    ],
)
def test_refused_bodies(body: bytes, place: Path) -> None:
    assert posted.problem_of(body, place / "uploads", "http://127.0.0.1:1")
    assert posted.problem_of(body, None, "http://127.0.0.1:1")


def test_usual_bodies_pass(place: Path) -> None:
    file = place / "uploads" / "a.jsonl"
    file.touch()
    origin = "http://127.0.0.1:1"
    for value in (None, [], {"data": ["text", 1.5, None, {"path": None}], "fn_index": 3}, {"path": str(file)}):
        assert not posted.problem_of(json.dumps(value).encode(), place / "uploads", origin)
    assert not posted.problem_of(b"", None, origin)
    assert posted.problem_of(json.dumps({"path": str(file)}).encode(), None, origin)
