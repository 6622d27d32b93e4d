"""The web page: access, limits, model failures, and the folders that it may read."""

from __future__ import annotations

import dataclasses
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")

import httpx
from starlette.testclient import TestClient

from tests.conftest import byte_level_tokenizer, dialogues, write_rows
from tests.serving.web.page_server import SECRET, TOKEN, Parrot, ask, client, make_chat_backend, serving
from tongwen.commands.web import make_backend
from tongwen.core.errors import RecipeError, TongwenError
from tongwen.serving.web.api import LANGUAGES, routes
from tongwen.serving.web.backend import ChatBackend, PageBackend
from tongwen.serving.web.conversation import StreamedAnswer, model_messages
from tongwen.serving.web.login import UploadLimits
from tongwen.serving.web.server import make_app
from tongwen.workflows import data_preview
from tongwen.workflows.workspace import Workspace

CHAT = {"model": "parrot", "system": "", "messages": [{"role": "user", "content": "x"}], "sampling": {}}


@pytest.fixture(scope="module")
def parrot() -> Parrot:
    return Parrot()


@pytest.fixture(scope="module")
def address(parrot: Parrot, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    uploads = tmp_path_factory.mktemp("uploads")
    with serving(PageBackend("tongwen", make_chat_backend(parrot, "parrot"), uploads=uploads)) as url:
        yield url


# -- who may come in -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> PageBackend:
    """The page with all its tabs."""
    top = tmp_path_factory.mktemp("whole")
    byte_level_tokenizer(top / "base")
    (top / "base" / "config.json").write_text("{}", encoding="utf-8")
    place = Workspace.of([str(top)], uploads=str(tmp_path_factory.mktemp("uploads")))
    return make_backend(place, make_chat_backend(Parrot(), "parrot"))


def test_every_route_requires_a_token(whole: PageBackend) -> None:
    listed = routes(whole)
    assert {f"/{name}/api/{one}" for name in LANGUAGES for one in ("chat", "upload", "start", "stop")} <= {
        one.path for one in listed
    }
    web = TestClient(make_app(whole, TOKEN, port=7860), base_url="http://127.0.0.1:7860")
    with web:
        for route in listed:
            for method in ("GET", "POST", "HEAD", "DELETE"):
                answer = web.request(method, route.path, headers={"origin": "http://127.0.0.1:7860"})
                assert answer.status_code == 401, (method, route.path)


def test_what_is_not_listed_is_not_there(whole: PageBackend, address: str) -> None:
    with client(address) as web:
        for path in ("/docs", "/openapi.json", "/static/", "/static/x.js", "/static/../api.py", "/en", "/fr/", "/EN/"):
            assert web.get(path).status_code == 404, path
        for route in routes(whole):  # the page at this address has the chat alone
            if any(route.path.endswith(f"/{name}") for name in ("inspect", "upload", "vocabulary", "start", "stop")):
                assert web.post(route.path, json={}).status_code == 404, route.path
        assert web.get("/report", params={"name": "report.html"}).status_code == 404
        assert web.get("/en/api/chat").status_code == 405 and web.post("/en/", json={}).status_code == 405


@pytest.mark.parametrize("token", ["", "x", TOKEN[:-1], TOKEN + "x", TOKEN.upper(), "错"])
def test_wrong_token_is_refused(address: str, token: str) -> None:
    given = token.encode("utf-8")
    with httpx.Client(base_url=address) as web:
        assert web.get("/en/", headers=[(b"authorization", b"Bearer" + b" " * bool(given) + given)]).status_code == 401
        assert (
            web.get("/en/", headers=[(b"cookie", f"tongwen_{web.base_url.port}=".encode() + given)]).status_code == 401
        )
        assert web.get("/en/", params={"token": token}).status_code == 401


def test_url_token_is_moved_to_a_cookie(address: str) -> None:
    with httpx.Client(base_url=address) as web:
        first = web.get("/", params={"token": TOKEN})
        assert first.status_code == 303 and first.headers["location"] == "/"
        assert {"httponly", "samesite=strict"} <= set(first.headers["set-cookie"].lower().split("; "))
        web.cookies.set(*first.headers["set-cookie"].split(";")[0].split("="))
        assert web.get("/", headers={"accept-language": "zh-CN,zh"}).headers["location"] == "/zh/"
        assert web.get("/", headers={"accept-language": "en"}).headers["location"] == "/en/"
        page = web.get("/en/")
    assert page.status_code == 200 and TOKEN not in page.text


@pytest.mark.parametrize(
    "origin", ["https://evil.example", "null", "http://localhost.evil:1", "http://127.0.0.1:1", ""]
)
def test_other_origin_is_refused(address: str, origin: str) -> None:
    with client(address) as web:
        if origin:
            web.headers["origin"] = origin
        else:
            del web.headers["origin"]
        answer = web.post("/en/api/chat", json=CHAT)
    assert answer.status_code == 403
    assert not [name for name in answer.headers if name.startswith("access-control-")]


@pytest.mark.parametrize("host", ["evil.example", "evil.example:7860", "127.0.0.1.evil:80", "localhost.evil:80", ""])
def test_other_host_is_refused(address: str, host: str) -> None:
    with client(address, host=host) as web:
        assert web.get("/en/").status_code == 403


def test_page_loads_no_external_resource(address: str) -> None:
    with client(address) as web:
        page = web.get("/en/")
        policy = page.headers["content-security-policy"]
        assert "unsafe-eval" not in policy and "'unsafe-inline'" not in policy.split("style-src")[0]
        assert "default-src 'none'" in policy and "http" not in policy
        assert "script-src 'self';" in policy, "no script in the page itself"
        assert not [name for name in page.headers if name.startswith("access-control-")]
        found = [part.split('"')[0] for mark in ('src="', 'href="') for part in page.text.split(mark)[1:]]
        assert "/static/studio.js" in found and all(one.startswith("/") for one in found)
        for asset in found:
            answer = web.get(asset)
            assert answer.status_code == 200 and answer.headers["x-content-type-options"] == "nosniff"


FORMS = ["../", "..%2f", "..%252f", "%2e%2e/", "%252e%252e/", "..\\", "..%5c", "..%00/", "....//", ".%2e/", "..;/", "/"]
TARGETS = ["{up}{file}", "{up}proc/self/environ", "//{file}", "file://{file}", "\\\\host\\{file}"]
PLACES = ["static/", "en/static/", "report?name=", "en/api/run?name=", "en/api/recipe?name=", "", "zh/api/"]


def test_path_traversal_is_refused(whole: PageBackend, tmp_path: Path) -> None:
    canary = tmp_path / "canary.txt"
    canary.write_text("canary-content", encoding="utf-8")
    tried = 0
    with serving(whole) as address, client(address) as web:
        for place in PLACES:
            for form in FORMS:
                for target in TARGETS:
                    path = place + target.format(up=form * 12, file=str(canary).lstrip("/"))
                    answer = web.get(f"{address}/{path}")
                    assert answer.status_code in (400, 403, 404, 422), (path, answer)
                    assert "canary-content" not in answer.text
                    tried += 1
    assert tried >= 60


def test_oversized_body_is_refused_at_once(whole: PageBackend) -> None:
    with serving(whole) as address, client(address) as web:
        assert web.post("/en/api/chat", content=b"x" * (UploadLimits.body + 1)).status_code == 413
        assert web.post("/en/api/upload", content=b"x" * (UploadLimits.body + 1)).status_code == 200
        assert web.post("/en/api/chat", content=iter([b"x"])).status_code == 411


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{broken",
        b"[" * 200_000,
        b"[]",
        b"\xff\xfe",
        json.dumps({**CHAT, "more": 1}).encode(),
        json.dumps({**CHAT, "model": {"path": "/etc/passwd"}}).encode(),
        json.dumps({**CHAT, "messages": [{"role": "system", "content": "x"}]}).encode(),
        json.dumps({**CHAT, "messages": [{"role": "user", "content": [{"type": "file"}]}]}).encode(),
        json.dumps({**CHAT, "messages": [{"role": "user", "content": "\ud800"}]}).encode(),
        json.dumps({**CHAT, "sampling": {"max_new_tokens": 10**9}}).encode(),
        json.dumps({**CHAT, "sampling": {"temperature": float("nan")}}).encode(),
    ],
)
def test_other_bodies_are_refused(body: bytes, address: str, parrot: Parrot) -> None:
    before = len(parrot.requests)
    with client(address) as web:
        answer = web.post("/en/api/chat", content=body)
    assert answer.status_code == 422 and answer.json()["problem"]
    assert len(parrot.requests) == before


@pytest.mark.parametrize("route", ["chat", "upload"])
def test_chunks_beside_a_length_are_refused(address: str, route: str) -> None:
    """The chunks would count, so that the length limits nothing."""
    port = int(address.rpartition(":")[2])
    head = (
        f"POST /en/api/{route} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nOrigin: {address}\r\n"
        f"Authorization: Bearer {TOKEN}\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n"
    )
    with socket.create_connection(("127.0.0.1", port), timeout=20) as line:
        line.sendall(head.encode() + b"200000\r\n" + b"x" * 1000)
        assert line.recv(100).startswith(b"HTTP/1.1 411 ")


def test_uploads_have_a_limit_together(tmp_path: Path) -> None:
    backend = make_backend(Workspace.of([], uploads=str(tmp_path)), make_chat_backend(Parrot(), "m"))
    limits = UploadLimits(upload=2000, uploads=3000)
    with serving(backend, limits) as url, client(url) as web:
        sent = [
            web.post("/en/api/upload", params={"name": "a.txt"}, content=os.urandom(size)).status_code
            for size in (1500, 3000, 1600, 500)
        ]
    assert sent == [200, 413, 413, 200]


def test_two_tabs_do_not_load_at_the_same_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers imports its parts at their first use, which fails in two threads at once."""
    loading, most = [0], [0]

    def slow(*_: Any) -> str:
        loading[0] += 1
        most[0] = max(most[0], loading[0])
        time.sleep(0.2)
        loading[0] -= 1
        return ""

    monkeypatch.setattr(data_preview, "samples_as_html", slow)
    rows = write_rows(tmp_path / "rows.jsonl", dialogues(2))
    look = make_backend(Workspace.of([], ["m"], str(tmp_path)), make_chat_backend(Parrot(), "m")).data
    assert look
    inspect = look.inspect
    threads = [threading.Thread(target=inspect, args=(str(rows), "m", "chatml")) for _ in range(3)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert most == [1]


def test_page_without_uploads_takes_none() -> None:
    with serving(PageBackend("t", make_chat_backend(Parrot(), "m"))) as url, client(url) as web:
        assert web.post("/en/api/upload", content=b"x").status_code == 404


# -- messages ------------------------------------------------------------------------------------------------------


def test_answer_is_complete_and_model_failure_is_reported(address: str, parrot: Parrot) -> None:
    whole = ask(address, "你好 👍🏽 `x < y` <b>")
    assert whole["text"] == "你好 👍🏽 `x < y` <b>" and not whole["problem"] and "characters/s" in whole["pace"]
    half = ask(address, "NAN 之后没有")
    assert half["text"] == "NAN" and "NaN" in half["problem"]
    assert "out of memory" in ask(address, "OOM")["problem"]
    ours = ask(address, "BUG")["problem"]
    assert SECRET not in ours and "the terminal has the details" in ours
    assert "终端" in ask(address, "BUG", language="zh")["problem"]
    assert ask(address, "还在吗")["text"] == "还在吗"


def test_too_long_conversation_is_refused(address: str, parrot: Parrot) -> None:
    before = len(parrot.requests)
    assert "the limit is 100,000" in ask(address, "长" * 50_000 + "x" * 50_001)["problem"]
    many = tuple({"role": "user", "content": "x"} for _ in range(500))
    assert "start a new one" in ask(address, "?", history=many)["problem"]
    assert len(parrot.requests) == before
    with pytest.raises(RecipeError, match="the limit is 100,000"):
        model_messages([], "x" * 100_001)


def test_sessions_are_isolated(address: str) -> None:
    heard: dict[str, str] = {}

    def visit(word: str) -> None:
        history: list[dict[str, Any]] = []
        for turn in range(3):
            question = {"role": "user", "content": f"{word}{turn}"}
            said = ask(address, f"{word}{turn}", history=history)["text"]
            history += [question, {"role": "assistant", "content": said}]
        heard[word] = json.dumps(history)

    words = [uuid.uuid4().hex for _ in range(4)]
    threads = [threading.Thread(target=visit, args=(word,)) for word in words]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    for word in words:
        assert heard[word].count(word) == 6
        assert not any(other in heard[word] for other in words if other != word)


def test_page_begins_with_the_settings_of_the_command(whole: PageBackend) -> None:
    settings = {"max_new_tokens": 10**6, "temperature": 5.0, "top_k": -1, "seed": 7, "beams": 1, "min_new_tokens": 0}
    chat = dataclasses.replace(whole.chat, settings=settings)
    with serving(PageBackend("t", chat)) as url, client(url) as web:
        sampling = web.get("/en/api/state").json()["sampling"]
        assert sampling == {
            **{"max_new_tokens": 4096, "temperature": 2.0, "top_p": 1.0, "top_k": 0},
            **{"repetition_penalty": 1.0, "seed": 7},
        }
        assert web.post("/en/api/chat", json={**CHAT, "sampling": sampling}).status_code == 200


def test_questions_wait_and_the_next_is_refused() -> None:
    held, codes = threading.Event(), list[int]()

    def reply(*question: Any) -> Iterator[str]:
        held.wait(60)
        yield "x"

    def visit(url: str) -> None:
        with client(url) as web:
            codes.append(web.post("/en/api/chat", json=CHAT, timeout=120).status_code)

    with serving(PageBackend("t", ChatBackend(list, (), lambda name, messages, options: messages, reply))) as url:
        threads = [threading.Thread(target=visit, args=(url,)) for _ in range(24)]
        [thread.start() for thread in threads]
        wait_for(lambda: len(codes) == 6)
        held.set()
        [thread.join() for thread in threads]
    assert codes == [503] * 6 + [200] * 18


def test_abandoned_answer_stops_the_model() -> None:
    parrot = Parrot()
    turns = [{"role": "user", "content": "很长" * 50}]
    one = StreamedAnswer(make_chat_backend(parrot, "m"), "m", turns, "", {})
    growing = one.pieces()
    next(growing)
    growing.close()
    assert parrot.closed == 1 and not one.problem


def test_a_visitor_who_leaves_stops_the_model() -> None:
    parrot = Parrot()
    parrot.pause = 0.02
    body = {**CHAT, "messages": [{"role": "user", "content": "很长" * 500}]}
    with serving(PageBackend("t", make_chat_backend(parrot, "m"))) as url:
        with client(url) as web, web.stream("POST", "/en/api/chat", json=body) as events:
            assert next(events.iter_lines())
        wait_for(lambda: parrot.closed == 1)
        assert ask(url, "下一个")["text"] == "下一个"


def wait_for(what: Callable[[], bool]) -> None:
    ends = time.monotonic() + 20
    while not what() and time.monotonic() < ends:
        time.sleep(0.05)
    assert what()


# -- where it may look ---------------------------------------------------------------------------------------------


def test_only_files_in_the_folders_are_listed(tmp_path: Path) -> None:
    inside, outside = tmp_path / "in", tmp_path / "out"
    for folder in (inside / "model", outside):
        folder.mkdir(parents=True)
        (folder / "config.json").write_text("{}", encoding="utf-8")
    (inside / "link").symlink_to(outside)
    (inside / "r.yaml").write_text("name: x\nbase: y\n", encoding="utf-8")
    (inside / "other.yaml").write_text("a: 1\n", encoding="utf-8")
    place = Workspace.of([str(inside)], ["hub/named"])
    assert place.models() == ["hub/named", str(inside / "model")]
    assert place.recipes() == [str(inside / "r.yaml")]
    assert place.model("hub/named") == "hub/named"
    for name in ("../out", str(outside), str(inside / "link"), f"{inside}/../out", "/etc/passwd", "x\0y", f"{inside}2"):
        with pytest.raises(TongwenError, match="outside"):
            place.inside(name)
    with pytest.raises(RecipeError, match="this is not a folder"):
        Workspace.of([str(tmp_path / "none")])
