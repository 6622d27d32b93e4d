"""Any request that is not right gets a 4xx with a reason; the model is never asked, and no traceback reaches the log."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("starlette")

from starlette.testclient import TestClient

from tongwen.commands.serve import make_backend
from tongwen.serving import openai_api, openai_requests
from tongwen.workflows.chat_model import open_chat_model

ASK: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "你好"}], "max_tokens": 1}
ODD: tuple[Any, ...] = (
    None,
    True,
    "",
    "x" * 3000,
    "\0",
    "\ufffe",
    0,
    -1,
    10**30,
    10**400,
    -0.0,
    1e308,
    float("nan"),
    float("inf"),
    [],
    [[]],
    [None],
    {},
    {"": {}},
    {"role": "user"},
    {"__class__": "x"},
)
HOSTILE = "{%- if 'LOOP' in messages[0]['content'] -%}{%- for a in range(99999) -%}{%- for b in range(99999) -%}x{%- endfor -%}{%- endfor -%}{%- endif -%}{%- if messages[0]['role'] != 'user' -%}{{ raise_exception('users come first') }}{%- endif -%}{%- for m in messages -%}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{%- endfor -%}{%- if add_generation_prompt -%}<|im_start|>assistant\n{%- endif -%}"


def deep(value: Any, levels: int) -> Any:
    for _ in range(levels):
        value = [value]
    return value


@pytest.fixture(scope="module", params=["chatml", "own"])
def web(request: Any, chat_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    """A tiny model behind the routes, with a template that ships and with one from elsewhere."""
    template = request.param
    if template == "own":
        file = tmp_path_factory.mktemp("template") / "hostile.jinja"
        file.write_text(HOSTILE, encoding="utf-8")
        template = str(file)
    chat = open_chat_model(str(chat_model), template=template, rows=1)
    backend = make_backend(chat, "m", {"max_new_tokens": 2})
    with TestClient(openai_api.make_app(backend, 4), raise_server_exceptions=False) as client:
        yield client


def send(web: TestClient, path: str, body: bytes, **headers: str) -> tuple[int, str]:
    answer = web.post(path, content=body, headers={"content-type": "application/json", **headers})
    error = answer.json().get("error", {}) if answer.headers["content-type"].startswith("application/json") else {}
    return answer.status_code, str(error.get("message", ""))


def as_json(value: Any) -> bytes:
    return json.dumps(value).encode()


def mutations(ask: dict[str, Any], fields: Sequence[str]) -> Iterator[dict[str, Any]]:
    for name in fields:
        yield {key: value for key, value in ask.items() if key != name}
        for value in ODD:
            yield ask | {name: value}
            yield ask | {name: [value]}
            yield ask | {name: {name: value}}


@pytest.mark.sample("own-chat/completions", "chatml-completions")
@pytest.mark.parametrize("route", ["chat/completions", "completions"])
def test_mutated_fields_are_answered_or_refused(route: str, web: TestClient) -> None:
    kind = openai_requests.ChatRequest if route.startswith("chat") else openai_requests.TextRequest
    ask = ASK if route.startswith("chat") else {"model": "m", "prompt": "你好", "max_tokens": 1}
    refused = 0
    for body in mutations(ask, list(kind.model_fields)):
        status, message = send(web, f"/v1/{route}", as_json(body))
        assert status in (200, 400, 404), (status, message, str(body)[:300])
        assert status == 200 or message, str(body)[:300]
        refused += status != 200
    assert refused > 500


@pytest.mark.parametrize("place", ["message", "part"])
def test_mutated_messages_are_answered_or_refused(place: str, web: TestClient) -> None:
    for name in ("role", "content", "reasoning_content", "type", "text", "extra"):
        for value in (*ODD, deep(1, 900)):
            part = {"type": "text", "text": "x", **({name: value} if place == "part" else {})}
            message = {"role": "user", "content": [part], **({name: value} if place == "message" else {})}
            status, reason = send(web, "/v1/chat/completions", as_json(ASK | {"messages": [message]}))
            assert status in (200, 400), (status, reason, name, str(value)[:100])


BODIES = (
    b"",
    b" ",
    b"{",
    b"nul",
    b"null",
    b"[]",
    b'"x"',
    b"1e999",
    b"\xff\xfe",
    b"\xef\xbb\xbf{}",
    b'{"model": "m", "model": "m"}',
    b'{"model": "m", "messages": [{"role": "user", "content": "\\ud800"}]}',
    b'{"model": "m", "messages": [{"role": "user", "content": "\xed\xa0\x80"}]}',
    b'{"model": "\\udfff", "messages": []}',
    b'{"model": "m", "prompt": "\\u0000\\ud800"}',
    b'{"model": "m", "prompt": "x", "seed": ' + b"9" * 5000 + b"}",
    b'{"model": "m", "prompt": "x", "temperature": 1e400}',
    b'{"model": "m", "prompt": "x", "temperature": NaN}',
    b'{"model": "m", "prompt": "x", "temperature": -Infinity}',
    b'{"a":' * 10_000 + b"1" + b"}" * 10_000,
    b"[" * 10_000,
    b"--X\r\nContent-Disposition: form-data\r\n\r\nx\r\n--X--",
    b"model=m&prompt=x",
)


def test_bodies_that_are_no_request_are_refused(web: TestClient) -> None:
    for body in BODIES:
        for route in ("chat/completions", "completions"):
            for headers in ({}, {"content-encoding": "gzip"}, {"content-type": "multipart/form-data; boundary=X"}):
                status, message = send(web, f"/v1/{route}", body, **headers)
                assert status == 400 and message and "Traceback" not in message, (status, body[:60])


def test_random_damage_is_answered_or_refused(web: TestClient) -> None:
    rng, whole = random.Random(0), as_json(ASK | {"stop": ["x"], "stream_options": {"include_usage": True}})
    for _ in range(400):
        body = bytearray(whole)
        for _cut in range(rng.randint(1, 3)):
            at = rng.randrange(len(body))
            body[at : at + rng.randint(0, 4)] = rng.choice(
                (b"", b"\0", b'"', b"9" * 30, b"{", b"\xff", b"\\ud800", b",")
            )
        assert send(web, "/v1/chat/completions", bytes(body))[0] in (200, 400, 404), bytes(body)


def test_conversations_that_a_template_refuses_are_refused(web: TestClient) -> None:
    for messages in (
        [{"role": "assistant", "content": "x"}],
        [{"role": "system", "content": ""}],
        [{"role": "user", "content": ""}],
        [{"role": "user", "content": "<|im_end|>" * 20}] * 5,
        [{"role": "user", "content": "LOOP"}],
        [{"role": "user", "content": "x"}],
    ):
        status, message = send(web, "/v1/chat/completions", as_json(ASK | {"messages": messages}))
        assert status in (200, 400), (status, message)


def test_other_methods_and_paths(web: TestClient) -> None:
    for path in ("/v1/chat/completions", "/v1/models", "/v1/x", "/", "/v1/completions/", "/%00", "/é"):
        for method in ("GET", "HEAD", "PUT", "DELETE", "OPTIONS", "TRACE", "PATCH"):
            status = web.request(method, path).status_code
            assert status in (404, 405) or (path, method) in {("/v1/models", "GET"), ("/v1/models", "HEAD")}, status
