"""The web page: access, limits, model failures, and the folders that it may read."""

from __future__ import annotations

import json
import os
import random
import socket
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("gradio")

import httpx
from starlette.routing import Mount

from tests.serving.web.page_server import SECRET, TOKEN, Parrot, ask, at_once, client, make_chat_backend, serving
from tongwen.core.errors import RecipeError, TongwenError
from tongwen.serving.web.backend import PageBackend
from tongwen.serving.web.conversation import (
    StreamedAnswer,
    as_json,
    as_markdown,
    drawn,
    model_messages,
    note,
    stream,
    text_of,
)
from tongwen.serving.web.login import OPEN_ROUTES, UploadLimits
from tongwen.serving.web.server import SESSIONS, make_app
from tongwen.workflows.workspace import Workspace

GOLDEN = Path(__file__).parent / "page_routes.txt"


@pytest.fixture(scope="module")
def parrot() -> Parrot:
    return Parrot()


@pytest.fixture(scope="module")
def address(parrot: Parrot, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    uploads = tmp_path_factory.mktemp("uploads")
    with serving(PageBackend("tongwen", make_chat_backend(parrot, "parrot"), uploads=uploads)) as url:
        yield url


# -- who may come in -----------------------------------------------------------------------------------------------


def routes_of(app: Any, prefix: str = "") -> Iterator[str]:
    """Every path that is registered, in what is mounted and included too."""
    for route in app.routes:
        if inner := getattr(route, "original_router", None):
            yield from routes_of(inner, prefix)
        elif isinstance(route, Mount):
            yield from routes_of(route.app, prefix + route.path)
        else:
            yield prefix + route.path


def test_only_questions_are_queued(address: str) -> None:
    """A click is lost if its event goes through a stream that is just being closed."""
    with client(address) as web:
        events = web.get("/en/config").json()["dependencies"]
        waiting = {one["api_name"]: one["id"] for one in events if one["queue"]}
        assert waiting.keys() == {"ask", "again", "again_1", "mend", "mend_1"}
        for number in waiting.values():
            assert at_once(web, "en", uuid.uuid4().hex, number, []).status_code == 404
        fresh = next(one["id"] for one in events if one["api_name"] == "_begin")
        assert at_once(web, "en", uuid.uuid4().hex, fresh, []).json()["data"]


def test_routes_match_the_golden_list_and_require_a_token(address: str) -> None:
    door = make_app(PageBackend("t", make_chat_backend(Parrot(), "m")), TOKEN, port=7860)
    routes = sorted(set(routes_of(door.app)))
    listed = "".join(f"{'open  ' if OPEN_ROUTES.fullmatch(_example(path)) else 'closed'} {path}\n" for path in routes)
    if os.environ.get("UPDATE_GOLDEN"):
        GOLDEN.write_text(listed, encoding="utf-8")
    assert listed == GOLDEN.read_text(encoding="utf-8"), (
        "Gradio's routes have changed: look at each, then UPDATE_GOLDEN=1"
    )
    assert sum(line.startswith("closed") for line in listed.splitlines()) > 60
    with client(address, token="") as web:
        for path in routes:
            for method in ("GET", "POST", "HEAD", "DELETE"):
                assert web.request(method, _example(path)).status_code == 401, (method, path)
    with client(address) as web:
        for path in routes:
            if not OPEN_ROUTES.fullmatch(_example(path)):
                assert web.get(_example(path)).status_code == 404, path
                assert web.post(_example(path), json={}).status_code == 404, path


def _example(path: str) -> str:
    """A path that such a route would match."""
    return "".join(
        part.partition("}")[2] if place else part for place, part in enumerate(path.replace("{", "x{").split("{"))
    )


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
        answer = web.post("/en/gradio_api/queue/join", json={"data": []})
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
        assert not [name for name in page.headers if name.startswith("access-control-")]
        for asset in ("theme.css", "static/js/iframeResizer.contentWindow.min.js"):
            assert web.get(f"/en/{asset}").status_code == 200


FORMS = ["../", "..%2f", "..%252f", "%2e%2e/", "%252e%252e/", "..\\", "..%5c", "..%00/", "....//", ".%2e/", "..;/", "/"]
TARGETS = ["{up}{file}", "{up}proc/self/environ", "//{file}", "file://{file}", "\\\\host\\{file}"]
PLACES = [
    "en/assets/",
    "en/static/",
    "report?name=",
    "en/gradio_api/file=",
    "en/gradio_api/heartbeat/",
    "",
    "zh/svelte/",
]


def test_path_traversal_is_refused(address: str, tmp_path: Path) -> None:
    canary = tmp_path / "canary.txt"
    canary.write_text("canary-content", encoding="utf-8")
    tried = 0
    with client(address) as web:
        for place in PLACES:
            for form in FORMS:
                for target in TARGETS:
                    path = place + target.format(up=form * 12, file=str(canary).lstrip("/"))
                    answer = web.get(f"{address}/{path}")
                    assert answer.status_code in (400, 403, 404), (path, answer)
                    assert "canary-content" not in answer.text
                    tried += 1
    assert tried >= 60


def test_oversized_body_is_refused_at_once(address: str) -> None:
    with client(address) as web:
        assert web.post("/en/gradio_api/queue/join", content=b"x" * (UploadLimits.body + 1)).status_code == 413
        assert web.post("/en/gradio_api/upload", content=b"x" * (UploadLimits.body + 1)).status_code != 413
        assert web.post("/en/gradio_api/queue/join", content=iter([b"x"])).status_code == 411
        assert web.post("/en/gradio_api/queue/join", content=b"{broken").status_code == 422


@pytest.mark.parametrize("route", ["run/predict", "queue/join", "upload"])
def test_chunks_beside_a_length_are_refused(address: str, route: str) -> None:
    """The chunks would count, so that the length limits nothing."""
    port = int(address.rpartition(":")[2])
    head = (
        f"POST /en/gradio_api/{route} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nOrigin: {address}\r\n"
        f"Authorization: Bearer {TOKEN}\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n"
    )
    with socket.create_connection(("127.0.0.1", port), timeout=20) as line:
        line.sendall(head.encode() + b"200000\r\n" + b"x" * 1000)
        assert line.recv(100).startswith(b"HTTP/1.1 411 ")


def test_uploads_have_a_limit_together(tmp_path: Path) -> None:
    backend = PageBackend("t", make_chat_backend(Parrot(), "m"), uploads=tmp_path)
    limits = UploadLimits(upload=2000, uploads=3000)
    with serving(backend, limits) as url, client(url) as web:
        sent = [
            web.post("/en/gradio_api/upload", files={"files": (f"{number}.txt", os.urandom(size))}).status_code
            for number, size in enumerate((1500, 3000, 1500, 500))
        ]
    assert sent == [200, 413, 413, 200]


def test_page_without_uploads_takes_none() -> None:
    with serving(PageBackend("t", make_chat_backend(Parrot(), "m"))) as url, client(url) as web:
        assert web.post("/en/gradio_api/upload", files={"files": ("a.txt", b"x")}).status_code == 404


# -- messages ------------------------------------------------------------------------------------------------------


def test_answer_is_complete_and_model_failure_is_reported(address: str, parrot: Parrot) -> None:
    assert ask(address, "你好 👍🏽 `x < y`")[-1]["content"] == "你好 👍🏽 `x < y`"
    half = ask(address, "NAN 之后没有")
    assert half[-2]["content"] == "NAN" and "NaN" in half[-1]["content"] and half[-1]["metadata"]["title"]
    assert "out of memory" in ask(address, "OOM")[-1]["content"]
    ours = ask(address, "BUG")[-1]["content"]
    assert SECRET not in ours and "the terminal has the details" in ours
    assert "终端" in ask(address, "BUG", language="zh")[-1]["content"]
    assert ask(address, "还在吗")[-1]["content"] == "还在吗"


def test_page_notes_are_not_sent_to_the_model(address: str, parrot: Parrot) -> None:
    history = ({"role": "user", "content": "一"}, {"role": "assistant", "content": "二"}, note("out of memory"))
    ask(address, "三", history=history)
    assert [one["content"] for one in parrot.requests[-1]] == ["一", "二", "三"]


def test_too_long_conversation_is_refused(address: str, parrot: Parrot) -> None:
    before = len(parrot.requests)
    assert "the limit is 100,000" in ask(address, "长" * 50_000 * 1 + "x" * 50_001)[-1]["content"]
    many = tuple({"role": "user", "content": "x"} for _ in range(500))
    assert "start a new one" in ask(address, "?", history=many)[-1]["content"]
    assert len(parrot.requests) == before


def test_sessions_are_isolated(address: str) -> None:
    heard: dict[str, str] = {}

    def visit(word: str) -> None:
        history: list[dict[str, Any]] = []
        for turn in range(3):
            history = ask(address, f"{word}{turn}", history=history)
        heard[word] = json.dumps(history)

    words = [uuid.uuid4().hex for _ in range(4)]
    threads = [threading.Thread(target=visit, args=(word,)) for word in words]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    for word in words:
        assert heard[word].count(word) == 6
        assert not any(other in heard[word] for other in words if other != word)


def test_number_of_open_sessions_is_limited() -> None:
    door = make_app(PageBackend("t", make_chat_backend(Parrot(), "m")), TOKEN, port=7860)
    holders = [route.app.state_holder for route in door.app.routes if isinstance(route, Mount)]
    assert len(holders) == 2
    for holder in holders:
        for number in range(SESSIONS + 5):
            assert holder[f"session {number}"]
        assert len(holder.session_data) == SESSIONS and "session 4" not in holder.session_data


HOSTILE = [
    "<script>alert(1)</script>",
    '<img src=x onerror="alert(1)">',
    "a < b && c > d; x &lt; y &amp;lt; &copy;",
    "<svg onload=alert(1)><iframe src='http://e.example'>",
    "<think>想</think>好",
    "`<b>` 和 ```\n<script>\n``` 与 <b>",
    "\\(a<b\\) $$x<y$$ <i>",
    "std::vector<int> v; </script><!-- ",
    "> " * 300 + "<b>",
]


@pytest.mark.parametrize("text", HOSTILE)
def test_model_output_is_escaped_and_restored(text: str) -> None:
    assert text_of(drawn(text)) == text
    assert text_of([{"type": "text", "text": drawn(text)}]) == text


def test_escaping_round_trips_for_any_text() -> None:
    rng = random.Random(0)
    parts = ["<b>", "</", "&lt;", "&amp;", "&", "<", "`", "```", "\n", "$$", "\\(", "\\)", "<think>", "字", "x", " "]
    for _ in range(3000):
        text = "".join(rng.choice(parts) for _ in range(rng.randrange(12)))
        assert text_of(drawn(text)) == text
    assert drawn("x <b>") == "x &lt;b>"
    assert "<" not in drawn("<script><img><svg>")


def test_abandoned_answer_stops_the_model() -> None:
    parrot = Parrot()
    messages = [{"role": "user", "content": "很长" * 50}]
    answers = [StreamedAnswer(make_chat_backend(parrot, "m"), messages, str, "m", "", {}) for _ in range(2)]
    growing = stream(answers)
    next(growing)
    growing.close()
    assert parrot.closed == 2 and all(0 < len(one.text) < 100 for one in answers)


def test_exported_conversation_matches_the_model_input() -> None:
    messages = [{"role": "user", "content": "问"}, {"role": "assistant", "content": drawn("<b>")}, note("no")]
    assert json.loads(as_json(messages, "短")) == {
        "messages": [
            {"role": "system", "content": "短"},
            {"role": "user", "content": "问"},
            {"role": "assistant", "content": "<b>"},
        ]
    }
    assert "## Answer\n\n<b>\n" in as_markdown(messages, "")
    with pytest.raises(RecipeError, match="start a new one"):
        model_messages([messages[0]] * 401, "")


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
