"""bench/fuzz.py in small: a few inputs of each kind break no law, and the harness sees a broken one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("hypothesis")
from bench.fuzz import grammars, storm
from bench.sandbox import Input, Sandbox

EACH = 3
KINDS = ("recipes", "yaml", "rows", "data files", "safetensors headers", "config.json", "adapter_config.json", "tokenizer files", "records of a run", "command lines", "conversations", "requests")  # fmt: skip


@pytest.fixture(scope="module")
def sandbox(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sandbox]:
    before = Path.cwd()
    yield Sandbox(tmp_path_factory.mktemp("sandbox"))
    os.chdir(before)


@pytest.mark.sample("recipes", "rows", "config.json", "command lines", "requests")
@pytest.mark.parametrize("kind", KINDS)
def test_generated_inputs_break_no_law(kind: str, sandbox: Sandbox) -> None:
    inputs, _share = grammars(sandbox.models)[kind]
    found = storm(sandbox, kind, inputs, EACH, start=1)
    assert found["inputs"] >= EACH and not found["faults"]


def test_broken_laws_are_seen(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(command: list[str]) -> int:
        if command == ["bug"]:
            raise KeyError("x")
        if command == ["write"]:
            Path("base/config.json").write_text("{}")
        if command == ["memory"]:
            return len(bytearray(3200 << 20)) and 0
        if command == ["escape"]:
            print("\x1b[31m")
        return 7 if command == ["code"] else 0

    monkeypatch.setattr("bench.sandbox.run_command", fails)
    wanted = {
        "bug": "KeyError",
        "write": "changed: ['base/config.json']",
        "memory": "MemoryError",
        "escape": "escape",
        "code": "exit 7",
    }
    for name, fault in wanted.items():
        files = {"base/x": b""} if name == "write" else {}
        assert fault in sandbox.run(Input([name], files)).fault
    assert not sandbox.run(Input(["fine"])).fault
