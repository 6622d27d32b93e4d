"""Uploads are complete, private and without the manifest; failures are reported."""

from __future__ import annotations

import base64
import importlib
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.hub.hub_server import CANARY, Handler, Hub, Repo
from tongwen.hub import upload


class UploadHandler(Handler):
    """The hub's answers to what huggingface_hub sends when it uploads small files."""

    def do_POST(self) -> None:  # noqa: N802
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.log.append({"path": self.path, "body": body, "auth": self.headers.get("Authorization")})
        refused = next((fault for fault in self.server.faults if fault[0] in self.path and fault[1].isdigit()), None)
        if refused:
            self.server.faults.remove(refused)
            return self.answer(int(refused[1]), f"you sent {self.headers.get('Authorization')}".encode(), {})
        found: dict[str, Any] = {}
        if self.path == "/api/repos/create":
            request = json.loads(body)
            name = f"{request['organization']}/{request['name']}" if request.get("organization") else request["name"]
            self.server.repos.setdefault(("model", name), Repo({}))
            found = {"url": f"{self.server.url}/{name}"}
        elif "/preupload/" in self.path:
            files = json.loads(body)["files"]
            found = {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]}
        elif self.path == "/api/validate-yaml":
            found = {"warnings": [], "errors": []}
        elif match := re.fullmatch(r"/api/models/(.+)/commit/main", self.path):
            for line in map(json.loads, body.decode().splitlines()):
                if line["key"] == "file":
                    content = base64.b64decode(line["value"]["content"])
                    spoiled = content + b"x" if ("commit", "spoil") in self.server.faults else content
                    self.server.repos["model", match[1]].files[line["value"]["path"]] = spoiled
            found = {"commitUrl": f"{self.server.url}/{match[1]}/commit/1", "commitOid": "1", "success": True}
        return self.answer(200, json.dumps(found).encode(), {"Content-Type": "application/json"})


@pytest.fixture()
def hub(server: Hub) -> Iterator[Hub]:
    server.RequestHandlerClass = UploadHandler
    yield server


@pytest.fixture()
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "hf"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")
    (folder / "manifest.json").write_text('{"parents": "/home/me"}')
    (folder / "code.py").write_text("raise SystemExit")
    return folder


def test_upload_is_complete_private_and_without_manifest(hub: Hub, model: Path) -> None:
    assert upload.push(model, "me/mine", print) == f"{hub.url}/me/mine"
    assert set(hub.repos["model", "me/mine"].files) == {"config.json", "README.md"}
    created = next(json.loads(one["body"]) for one in hub.log if one["path"] == "/api/repos/create")
    assert created["visibility"] == "private"
    assert upload.push(model, "me/mine", print, public=True)


def test_convert_pushes_to_the_hub(hub: Hub, chat_model: Path, tmp_path: Path, tongwen: Any) -> None:
    out = tmp_path / "out"
    code, stdout, _ = tongwen("convert", chat_model, "--to", "hf", "--out", out, "--push", "me/tiny", "--json")
    assert code == 0 and json.loads(stdout)["pushed"] == f"{hub.url}/me/tiny"
    assert hub.repos["model", "me/tiny"].files["model.safetensors"] == (out / "model.safetensors").read_bytes()
    for arguments, remedy in ((("--push", "tiny"), "OWNER/NAME"), (("--push", "me/tiny", "--to", "gguf"), "--to hf")):
        code, _, err = tongwen("convert", chat_model, "--to", "hf", "--out", tmp_path / "no", *arguments)
        assert code == 2 and remedy in err and not (tmp_path / "no").exists()


def test_failed_upload_is_reported_without_the_token(hub: Hub, model: Path, tongwen: Any) -> None:
    for fault, wanted in (
        (("create", "403"), "HTTP 403"),
        (("commit", "spoil"), "differs from the file that was sent"),
    ):
        hub.faults = [fault]
        with pytest.raises(upload.MachineError, match=wanted) as error:
            upload.push(model, "me/other", print)
        assert CANARY not in error.value.text() and error.value.exit_code == 5


def test_modelscope_uses_its_own_package(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[Any] = []

    class Api:
        size = 2

        def login(self, token: str) -> None:
            called.append(("login", token))

        def repo_exists(self, name: str, repo_type: str) -> bool:
            return False

        def create_model(self, name: str, visibility: int) -> None:
            called.append(("create", name, visibility))

        def upload_folder(self, repo_id: str, folder_path: str, ignore_patterns: list[str]) -> None:
            called.append(("upload", repo_id, folder_path))

        def get_model_files(self, name: str, recursive: bool) -> list[dict[str, Any]]:
            return [{"Path": "config.json", "Size": self.size}, {"Path": "README.md", "Size": 21}]

    package = importlib.import_module("types").ModuleType("modelscope.hub.api")
    package.HubApi = Api  # type: ignore[attr-defined]
    for name in ("modelscope", "modelscope.hub"):
        monkeypatch.setitem(sys.modules, name, importlib.import_module("types").ModuleType(name))
    monkeypatch.setitem(sys.modules, "modelscope.hub.api", package)
    monkeypatch.setenv("MODELSCOPE_API_TOKEN", CANARY)
    assert upload.push(model, "modelscope:me/mine", print).endswith("modelscope.cn/models/me/mine")
    assert called == [("login", CANARY), ("create", "me/mine", 1), ("upload", "me/mine", str(model))]
    monkeypatch.setattr(Api, "size", 3)
    with pytest.raises(upload.MachineError, match=r"config\.json on the hub differs from the file that was sent"):
        upload.push(model, "modelscope:me/mine", print)
