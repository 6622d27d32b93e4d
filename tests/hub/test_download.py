"""Downloads match the hub's hashes despite network failures; no wrong file is kept."""

from __future__ import annotations

import errno
import hashlib
import importlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from tests.hub.hub_server import CANARY, COMMIT, DATA, LINES, MODEL, ROWS, WEIGHTS, Hub, Repo
from tongwen.commands import fetch
from tongwen.core import artifact, console
from tongwen.core.errors import TongwenError
from tongwen.hub import download, names, transfer


@pytest.fixture()
def call(capsys: pytest.CaptureFixture[str]) -> Any:
    """Run `tongwen fetch` in this process: (exit code, everything it said)."""

    def run(*arguments: Any, **options: Any) -> tuple[int, str]:
        console.SCREEN.json = False
        console.SCREEN.console = Console(highlight=False, width=300)
        try:
            code, output = fetch.run(*arguments, **options), ""
        except TongwenError as error:
            code, output = error.exit_code, error.text()
        out, err = capsys.readouterr()
        assert CANARY not in out + err + output
        return code, out + err + output

    return run


def files_in(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()} - {artifact.MANIFEST}


# -- what arrives --------------------------------------------------------------------------------------------------


def test_dataset_is_downloaded_once(server: Hub, call: Any, tmp_path: Path) -> None:
    code, output = call("belle-1m", "data/belle")
    out = tmp_path / "data" / "belle"
    assert code == 0, output
    assert files_in(out) == {"README.md", "Belle_open_source_1M.json"}
    assert (out / "Belle_open_source_1M.json").read_bytes() == LINES
    assert "load.py" in output and "code" in output
    manifest = artifact.open_artifact(out, "fetch").manifest
    assert manifest["files"]["README.md"]["sha256"] == hashlib.sha256("说明".encode()).hexdigest()
    assert manifest["source"]["commit"] == COMMIT
    assert manifest["fingerprint"] == artifact.fingerprint_files(out)
    assert {one["auth"] for one in server.log} == {f"Bearer {CANARY}"}
    assert CANARY not in json.dumps(manifest)
    assert not list(out.parent.glob("*.partial")) and not list(out.parent.glob(".*"))

    request_count = len(server.log)
    code, output = call("belle-1m", "data/belle")
    assert code == 0 and "already here" in output and len(server.log) == request_count

    (out / "README.md").write_text("shortened")
    code, output = call("belle-1m", "data/belle")
    assert (
        code == 4
        and "README.md" in output
        and "the file has 9 bytes, but the download had 6" in output
        and "--again" in output
    )
    code, output = call("belle-1m", "data/belle", again=True)
    assert code == 0 and (out / "README.md").read_text() == "说明", output
    assert len(server.requests_to("1M.json")) == 1, "what was whole is not fetched again"
    assert (out.parent / "belle.old-1" / "README.md").read_text() == "shortened"


def test_other_settings_are_refused_with_both_values(server: Hub, call: Any, tmp_path: Path) -> None:
    assert call("belle-1m", "d")[0] == 0
    code, output = call("belle-1m", "d", dev=0.05)
    assert code == 2 and "dev: None → 0.05" in output and "--again" in output
    code, output = call("belle-1m", "d", dev=0.05, again=True)
    assert code == 0 and len(server.requests_to("1M.json")) == 1, output
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    code, output = call("belle-1m", "mine")
    assert code == 4 and "--out" in output and (tmp_path / "mine" / "thesis.txt").read_text() == "precious"


def test_model_is_fetched_without_pickles_and_code(server: Hub, call: Any, tmp_path: Path) -> None:
    code, output = call(MODEL)  # its kind comes from the hub, and it goes to models/
    assert code == 0, output
    assert files_in(tmp_path / "models" / "model") == {"config.json", "model.safetensors"}
    assert "pytorch_model.bin" in output and "modeling_tiny.py" in output and "training_args.bin" in output
    request_count = len(server.log)
    assert call(MODEL)[0] == 0 and len(server.log) == request_count
    assert call(MODEL, "with_code", code=True)[0] == 0 and (tmp_path / "with_code" / "modeling_tiny.py").is_file()
    del server.repos["model", MODEL].files["model.safetensors"]
    code, output = call(MODEL, "old")
    assert code == 0 and (tmp_path / "old" / "pytorch_model.bin").is_file() and "pickles" in output
    assert not (tmp_path / "old" / "training_args.bin").exists()
    code, output = call(MODEL, "some", files=["config.*"], kind="model")
    assert code == 0 and files_in(tmp_path / "some") == {"config.json"}


def test_adapter_names_the_current_id_of_its_base(server: Hub, call: Any) -> None:
    config = json.dumps({"base_model_name_or_path": "decapoda-research/llama-7b-hf"}).encode()
    server.repos["model", "a/lora"] = Repo({"adapter_config.json": config, "adapter_model.bin": b"x"})
    code, output = call("a/lora", "lora")
    assert code == 0 and "tongwen merge --base yahma/llama-7b-hf --adapter lora" in output


# -- what breaks on the way ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("faults", "requests"),
    [
        (["broken"], [None, 512_000]),
        (["broken", "broken", "broken"], [None, 512_000, 768_000, 896_000]),
        (["broken", "no ranges"], [None, 512_000]),
        (["too long"], [None]),  # all bytes are here: only the answer was not
        (["too short"], [None, 512_000]),
        (["more"], [None, None]),
        (["wrong"], [None, None]),
        (["wrong", "broken", "wrong"], [None, None, 512_000, None]),
        (["page", "page"], [None, None, None]),
        (["500", "502", "503", "504"], [None] * 5),
        (["429"], [None, None]),
        (["redirect"], [None]),
    ],
    ids=lambda value: "-".join(str(one) for one in value).replace(" ", "_"),
)
def test_unreliable_connection_resumes_without_loss(
    faults: list[str], requests: list[Any], server: Hub, tmp_path: Path
) -> None:
    server.faults = [("resolve/" + COMMIT + "/model.safetensors", fault) for fault in faults]
    waited: list[float] = []
    told: list[str] = []
    wanted = names.HubRef(MODEL, MODEL, "model")
    found, here = download.fetch(wanted, tmp_path / "m", told.append, sleep=waited.append)
    assert not here
    assert (found.path / "model.safetensors").read_bytes() == WEIGHTS
    assert found.manifest["files"]["model.safetensors"]["sha256"] == hashlib.sha256(WEIGHTS).hexdigest()
    sent = [one for one in server.requests_to("model.safetensors") if not one["path"].startswith("/cdn")]
    assert [int(one["range"][6:-1]) if one["range"] else None for one in sent] == requests
    assert not server.faults
    if faults == ["429"]:
        assert waited == [7.0] and any("429" in text for text in told)
    if faults == ["redirect"]:
        assert server.requests_to("/cdn/")[0]["auth"] is None, "the token stays with the hub"


def test_retry_waits_grow_and_are_capped(server: Hub, tmp_path: Path) -> None:
    for headers, seconds in (
        ({"Retry-After": "7"}, 7),
        ({"Retry-After": "-5"}, 0),
        ({"Retry-After": "soon"}, 0),
        ({"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"}, 0),
        ({"Retry-After": "9" * 7}, 9_999_999),
        ({"RateLimit": '"api";r=0;t=55'}, 55),
    ):
        assert transfer._retry_after(headers) == seconds
    waited: list[float] = []
    server.faults = [("config.json", "503"), ("config.json", "503"), ("config.json", "503")]
    download.fetch(
        names.HubRef(MODEL, MODEL, "model"),
        tmp_path / "m",
        lambda text: None,
        waits=(1, 2, 4),
        sleep=waited.append,
    )
    assert waited == [1, 2, 4]

    def ask() -> None:
        raise transfer.TransientError("429", 10**6)

    waited.clear()
    patient = transfer.HubClient(names.HubRef(MODEL, MODEL, "model"), lambda text: None, (1, 1), waited.append)
    with pytest.raises(TongwenError) as error:
        patient.with_retries("x", ask)
    assert waited == [transfer.LONGEST_WAIT_SECONDS] * 2 and "3 tries" in error.value.text()


@pytest.mark.parametrize(
    ("fault", "count", "requests", "expected"),
    [
        ("wrong", 9, 3, ("tiny/model/model.safetensors", "but the hub lists", hashlib.sha256(WEIGHTS).hexdigest())),
        ("500", 99, 5, ("HTTP 500", "5 tries", "HF_ENDPOINT=https://hf-mirror.com", "modelscope:")),
        ("page", 99, 5, ("the server sent a web page", "login")),
        ("error:401:GatedRepo", 1, 1, ("HTTP 401", "request access at", "HF_TOKEN")),
        ("error:403:", 1, 1, ("HTTP 403", "request access at", "HF_TOKEN")),
        ("404", 1, 1, ("lists this file but does not have it", "model.safetensors")),
        ("418", 1, 1, ("the hub refused: HTTP 418",)),
    ],
)
def test_failed_download_is_reported_and_leaves_no_file(
    fault: str, count: int, requests: int, expected: tuple[str, ...], server: Hub, call: Any, tmp_path: Path
) -> None:
    server.faults = [("model.safetensors", fault)] * count
    code, output = call(MODEL, "m", kind="model")
    assert code == 5, output
    for word in expected:
        assert word in output
    assert len(server.requests_to("model.safetensors")) == requests
    assert not (tmp_path / "m").exists()
    assert not (tmp_path / "m.partial" / "model.safetensors").exists()
    if fault == "wrong":
        flipped = WEIGHTS[:-1] + bytes([WEIGHTS[-1] ^ 1])
        assert hashlib.sha256(flipped).hexdigest() in output
        assert not list((tmp_path / "m.partial").rglob("*.part"))
    server.faults = []
    assert call(MODEL, "m", kind="model")[0] == 0, "the same command continues"
    assert len(server.requests_to("/config.json")) == 1


def test_killed_download_fetches_only_the_rest(server: Hub, call: Any, tmp_path: Path) -> None:
    server.faults = [("model.safetensors", "stalled")]
    code = f"from tongwen.commands import fetch; fetch.run({MODEL!r}, 'm', kind='model')"
    source = str(Path(fetch.__file__).parents[2])
    environment = {**os.environ, "PYTHONPATH": source, "HF_HUB_OFFLINE": "0"}
    process = subprocess.Popen([sys.executable, "-c", code], env=environment, cwd=tmp_path)
    parts, until = list[Path](), time.monotonic() + 20
    while time.monotonic() < until and not (parts and transfer.size_of(parts[0]) > 400_000):
        parts = list((tmp_path / "m.partial" / download.WORK_FOLDER).glob(hashlib.sha256(WEIGHTS).hexdigest() + "*"))
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (tmp_path / "m").exists()
    have = parts[0].stat().st_size
    assert 0 < have < len(WEIGHTS)
    server.repos["model", MODEL].files["new.txt"] = b"of a later commit"
    before = len(server.log)
    assert call(MODEL, "m", kind="model")[0] == 0
    assert [(one["path"].split("/")[-1], one["range"], one["sent"]) for one in server.log[before:]] == [
        ("model.safetensors", f"bytes={have}-", len(WEIGHTS) - have)
    ], "no list, no config, no byte twice"
    assert (tmp_path / "m" / "model.safetensors").read_bytes() == WEIGHTS
    assert files_in(tmp_path / "m") == {"config.json", "model.safetensors"}


def test_deleted_commit_is_replaced_by_the_current_one(server: Hub, call: Any, tmp_path: Path) -> None:
    server.faults = [("model.safetensors", "500")] * 5
    assert call(MODEL, "m", kind="model")[0] == 5
    repo = server.repos["model", MODEL]
    repo.commit, repo.files["config.json"] = "d" * 40, b'{"model_type": "qwen3"}'
    assert call(MODEL, "m", kind="model")[0] == 0
    assert (tmp_path / "m" / "config.json").read_bytes() == b'{"model_type": "qwen3"}'
    assert artifact.open_artifact(tmp_path / "m", "fetch").manifest["source"]["commit"] == "d" * 40


@pytest.mark.parametrize("path", ["../x", "a/../../x", "/etc/x", "C:\\x", "a//x", "a/./x", "a\nx", ""])
def test_path_outside_the_folder_is_refused(path: str, server: Hub, call: Any, tmp_path: Path) -> None:
    server.repos["model", MODEL].files[path] = b"evil"
    code, output = call(MODEL, "m", kind="model")
    assert code == 3 and "outside the folder" in output
    assert not server.requests_to("resolve") and not (tmp_path / "m").exists()


def test_invalid_listing_is_refused(server: Hub, call: Any) -> None:
    server.repos["model", MODEL].claims["model.safetensors"] = {"lfs": None, "blobId": None}
    code, output = call(MODEL, "m", kind="model")
    assert code == 5 and "downloads cannot be verified" in output and "model.safetensors" in output
    server.faults = [("/api/", "page")] * 99
    code, output = call(MODEL, "n", kind="model")
    assert code == 5 and "login page" in output and len(server.requests_to("/api/")) == 1 + 5


def test_missing_network_gives_one_message(
    server: Hub, call: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://user:secret@127.0.0.1:9")  # nobody listens there
    code, output = call("chatglm-6b", "m")
    assert code == 5
    assert (
        "export HF_ENDPOINT=https://hf-mirror.com" in output and "tongwen fetch modelscope:ZhipuAI/ChatGLM-6B" in output
    )
    assert "3 tries" in output and "secret" not in output and "http://127.0.0.1:9" in output
    monkeypatch.setenv("HF_ENDPOINT", "hf-mirror.com")
    code, output = call("chatglm-6b", "m")
    assert code == 5 and "'hf-mirror.com' is not a URL" in output


def test_offline_uses_local_files(server: Hub, call: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    assert call("belle-1m")[0] == 0
    request_count = len(server.log)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    code, output = call("belle-1m")
    assert code == 0 and "data/train_1M_CN" in output
    code, output = call("belle-0.5m")
    assert code == 5 and "HF_HUB_OFFLINE" in output and "unset" in output
    assert len(server.log) == request_count


def test_full_disk_is_detected_before_download(server: Hub, call: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type("Usage", (), {"free": 1_000_000})
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    code, output = call(MODEL, "m", kind="model")
    assert code == 5 and "1.02 MB needed, 1 MB free" in output and not server.requests_to("resolve")


def test_full_disk_during_download_is_not_retried(
    server: Hub, call: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    real = transfer.HubClient._stream

    def fill(self: Any, url: str, place: str, remote: Any, part: Path, have: int, arrived: Any) -> None:
        def full(size: int) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        real(self, url, place, remote, part, have, full if remote.path == "model.safetensors" else arrived)

    monkeypatch.setattr(transfer.HubClient, "_stream", fill)
    with pytest.raises(OSError, match="No space left") as error:  # the front door says it, with exit code 5
        call(MODEL, "m", kind="model")
    assert error.value.errno == errno.ENOSPC and len(server.requests_to("model.safetensors")) == 1
    assert not (tmp_path / "m").exists()
    monkeypatch.setattr(transfer.HubClient, "_stream", real)
    assert call(MODEL, "m", kind="model")[0] == 0
    assert server.requests_to("model.safetensors")[1]["range"], "the same command continues"


# -- names ---------------------------------------------------------------------------------------------------------


def test_old_names_are_replaced_with_a_notice(server: Hub, call: Any) -> None:
    server.repos["model", "yahma/llama-7b-hf"] = Repo({"config.json": b"{}"})
    code, output = call("decapoda-research/llama-7b-hf", "m")
    assert code == 0 and "decapoda-research/llama-7b-hf has moved: fetching yahma/llama-7b-hf instead" in output
    for old, new in (
        ("THUDM/chatglm-6b", "zai-org/chatglm-6b"),
        ("ziqingyang/chinese-llama-plus-lora-7b", "hfl/chinese-llama-plus-lora-7b"),
        (
            "Facico/Chinese-Vicuna-lora-7b-3epoch-belle-and-guanaco",
            "Chinese-Vicuna/Chinese-Vicuna-lora-7b-3epoch-belle-and-guanaco",
        ),
    ):
        told: list[str] = []
        assert names.resolve(old, told.append).id == new and old in told[0] and new in told[0]
    told = []
    assert names.resolve("BelleGroup/train_1M_CN", told.append).kind == "dataset" and not told


def test_hub_rename_is_reported(server: Hub, call: Any) -> None:
    server.repos["model", "old/name"] = server.repos["model", MODEL] = Repo({"config.json": b"{}"}, id=MODEL)
    code, output = call("old/name", "m", kind="model")
    assert code == 0 and "old/name is now called tiny/model" in output


def test_unknown_name_suggests_the_nearest_three(server: Hub, call: Any) -> None:
    code, output = call("bele-1m")
    assert code == 2 and "'bele-1m'" in output
    near = output.split("→")[1].split(";")[0]
    assert "belle-1m" in near and near.count(",") == 2
    code, output = call("nobody/nothing")
    assert code == 2 and "no model or data set nobody/nothing" in output and "HF_TOKEN" in output
    code, output = call("BelleGroup/train_1M_CN@nowhere", "d")
    assert code == 2 and "train_1M_CN@nowhere" in output
    for bad in ("../etc/passwd", "a/b/c", "a b/c", "-rf/x", "owner/..", "好/的"):
        assert call(bad)[0] == 2
    server.repos["dataset", MODEL] = Repo({"a.jsonl": b"{}"})
    code, output = call(MODEL)
    assert code == 2 and "--kind" in output


def test_repository_name_formats() -> None:
    def silent(text: str) -> None:
        raise AssertionError(text)

    for name, expected in (
        ("hub:BelleGroup/train_1M_CN@v1", (DATA, "dataset", "hub", "v1")),
        ("https://huggingface.co/datasets/BelleGroup/train_1M_CN/tree/main", (DATA, "dataset", "hub", "")),
        ("https://hf-mirror.com/tiny/model", (MODEL, "model", "hub", "")),
        ("https://modelscope.cn/models/tiny/model", (MODEL, "model", "modelscope", "")),
        ("modelscope:chatglm-6b", ("ZhipuAI/ChatGLM-6B", "model", "modelscope", "")),
        ("modelscope:a/b", ("a/b", "model", "modelscope", "")),
        ("Train_1m_cn", (DATA, "dataset", "hub", "")),
    ):
        wanted = names.resolve(name, silent)
        assert (wanted.id, wanted.kind, wanted.where, wanted.revision) == expected
    with pytest.raises(TongwenError, match="the ModelScope location of"):
        names.resolve("modelscope:belle-1m", silent)


def test_name_table_is_consistent(call: Any) -> None:
    seen: dict[str, str] = {}
    for key, entry in names.names().items():
        assert entry["kind"] in ("dataset", "model") and names.is_id(entry["hub"])
        assert set(entry) <= {"kind", "hub", "modelscope", "moved_from", "also", "files"}
        for word in {word.lower() for word in names._all_names(key)}:
            assert seen.setdefault(word, key) == key, f"{word} means two things"
    code, output = call("")
    assert code == 0 and "belle-1m" in output and "zai-org/chatglm-6b" in output


# -- splitting -----------------------------------------------------------------------------------------------------


def rows_of(file: Path) -> list[Any]:
    return [json.loads(row) for row in file.read_text(encoding="utf-8").splitlines()]


def test_split_is_seeded_and_loses_no_row(server: Hub, call: Any, tmp_path: Path) -> None:
    code, output = call("belle-1m", "d", dev=0.1, seed=3)
    assert code == 0, output
    train, dev = (rows_of(tmp_path / "d" / f"Belle_open_source_1M.{part}.jsonl") for part in ("train", "dev"))
    assert (len(train), len(dev)) == (180, 20)
    key = lambda row: int(row["instruction"][1:])  # noqa: E731
    assert sorted(train + dev, key=key) == ROWS
    assert [key(row) for row in dev] != sorted(key(row) for row in dev)
    assert "held_out: d/Belle_open_source_1M.dev.jsonl" in output
    manifest = artifact.open_artifact(tmp_path / "d", "fetch").manifest
    assert manifest["made"]["Belle_open_source_1M.dev.jsonl"]["rows"] == 20
    assert manifest["fingerprint"] == artifact.fingerprint_files(tmp_path / "d")

    assert call("belle-1m", "same", dev=0.1, seed=3, old_names=True)[0] == 0
    assert call("belle-1m", "other", dev=0.1, seed=4)[0] == 0
    assert rows_of(tmp_path / "same" / "Belle_open_source_1M.dev.json") == dev
    assert rows_of(tmp_path / "same" / "Belle_open_source_1M.train.json") == train
    assert rows_of(tmp_path / "other" / "Belle_open_source_1M.dev.jsonl") != dev


@pytest.mark.parametrize("form", ["array", "pretty", "one line", "crlf and bom", "no last line break"])
def test_every_row_format_is_split(form: str, tmp_path: Path) -> None:
    rows = [
        {"instruction": 'a "quoted" \\ [x], {y}', "output": "一\n二", "n": n, "list": [1, {"a": []}], "number": 1e-5}
        for n in range(9)
    ]
    lines = [json.dumps(row, ensure_ascii=n % 2 == 0) for n, row in enumerate(rows)]
    content = {
        "array": json.dumps(rows, ensure_ascii=False),
        "pretty": " \n" + json.dumps(rows, ensure_ascii=False, indent=2) + "\n\n",
        "one line": "[" + ",".join(lines) + "]",
        "crlf and bom": "\ufeff" + "\r\n\r\n".join(lines) + "\r\n",
        "no last line break": "\n".join(lines),
    }[form]
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "x.json").write_bytes(content.encode())
    made = fetch.split_files(tmp_path, ["sub/x.json", "README.md"], 0.01, 1)
    assert set(made) == {"sub/x.train.jsonl", "sub/x.dev.jsonl"}
    train, dev = rows_of(tmp_path / "sub" / "x.train.jsonl"), rows_of(tmp_path / "sub" / "x.dev.jsonl")
    assert len(dev) == 1 and sorted(train + dev, key=lambda row: row["n"]) == rows
    for name, facts in made.items():
        assert facts["sha256"] == artifact.hash_file(tmp_path / name)


def test_unsplittable_file_is_refused(server: Hub, call: Any, tmp_path: Path) -> None:
    for name, content in (
        ("cut.json", '[{"a": 1}, {"a": '),
        ("two.json", '[{"a": 1}] [1]'),
        ("quote.json", '[{"a": "'),
    ):
        (tmp_path / name).write_text(content)
        with pytest.raises(TongwenError, match="one complete JSON array") as error:
            fetch.split_files(tmp_path, [name], 0.1, 1)
        assert name in error.value.text() and error.value.exit_code == 3
    (tmp_path / "config.json").write_text('{\n "a": 1\n}')
    (tmp_path / "empty.json").write_text("")
    with pytest.raises(TongwenError, match="no file with rows"):
        fetch.split_files(tmp_path, ["config.json", "empty.json"], 0.1, 1)
    assert call("belle-1m", "d", dev=1.5)[0] == 2
    assert call("belle-1m", "d", old_names=True)[0] == 2
    assert call(MODEL, "m", dev=0.1)[0] == 2
    server.repos["dataset", DATA].files["Belle_open_source_1M.json"] = b'{"one": "row"}\n'
    code, output = call("belle-1m", "d", dev=0.1)
    assert code == 3 and "held_out" in output and not (tmp_path / "d").exists()
    assert call("belle-1m", "d")[0] == 0, "what was fetched is used without the split"
    assert len(server.requests_to("1M.json")) == 1


# -- from a recipe, and ModelScope ---------------------------------------------------------------------------------


def test_recipe_source_is_cached(server: Hub, tmp_path: Path) -> None:
    told: list[str] = []
    folder = Path(download.local_copy(f"hub:{DATA}", told.append))
    assert folder == tmp_path / "cache" / "tongwen" / "data" / "BelleGroup--train_1M_CN"
    assert files_in(folder) == {"Belle_open_source_1M.json"}, "rows, and nothing that could be taken for rows"
    request_count = len(server.log)
    assert download.local_copy(f"hub:{DATA}", told.append) == str(folder) and len(server.log) == request_count
    server.repos["dataset", "a/pictures"] = Repo({"cat.png": b"x", "LICENSE.txt": b"x", "dataset_infos.json": b"{}"})
    with pytest.raises(TongwenError, match=r"cat\.png") as error:
        download.local_copy("hub:a/pictures", told.append)
    assert error.value.exit_code == 3


def test_concurrent_calls_fetch_once(server: Hub, tmp_path: Path) -> None:
    found: list[str] = []
    threads = [
        threading.Thread(target=lambda: found.append(download.local_copy(f"hub:{DATA}", lambda text: None)))
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 3 and len(set(found)) == 1 and len(server.requests_to("1M.json")) == 1


def test_modelscope_uses_its_own_package(
    server: Hub, call: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("modelscope", "modelscope.hub", "modelscope.hub.api", "modelscope.hub.snapshot_download"):
        monkeypatch.setitem(sys.modules, name, None)
    code, output = call("modelscope:a/b", "m")
    assert code == 5 and "pip install 'tongwen[modelscope]'" in output

    snapshots: list[Any] = []
    content = {"config.json": b"{}", "model.safetensors": b"tensors", "model.bin": b"pickle", "code.py": b"x"}

    class Api:
        def get_model_files(self, id_: str, **options: Any) -> list[dict[str, Any]]:
            return [{"Path": path, "Size": len(data)} for path, data in content.items()]

    def snapshot(id_: str, *, local_dir: str, allow_patterns: list[str], **options: Any) -> str:
        snapshots.append((id_, allow_patterns))
        for path in allow_patterns:
            (Path(local_dir) / path).write_bytes(content[path])
        (Path(local_dir) / ".msc").write_bytes(b"bookkeeping")
        return local_dir

    modules = {
        name: importlib.import_module("types").ModuleType(name)
        for name in ("modelscope", "modelscope.hub", "modelscope.hub.api", "modelscope.hub.snapshot_download")
    }
    modules["modelscope"].snapshot_download = snapshot  # type: ignore[attr-defined]
    modules["modelscope.hub.api"].HubApi = Api  # type: ignore[attr-defined]
    modules["modelscope.hub.snapshot_download"].dataset_snapshot_download = snapshot  # type: ignore[attr-defined]
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    code, output = call("modelscope:a/b", "m")
    assert code == 0, output
    assert snapshots == [("a/b", ["config.json", "model.safetensors"])]
    assert files_in(tmp_path / "m") == {"config.json", "model.safetensors"}
    assert artifact.open_artifact(tmp_path / "m", "fetch").manifest["source"]["where"] == "modelscope"
    assert not server.log
    content["model.safetensors"] = b"tensors and more"
    real = Api.get_model_files
    monkeypatch.setattr(Api, "get_model_files", lambda self, id_, **o: [{**one, "Size": 3} for one in real(self, id_)])
    code, output = call("modelscope:a/b", "n")
    assert code == 5 and "lists 3 bytes" in output and not (tmp_path / "n").exists()
