"""The gate of all paths from elsewhere: only what is in the folders, after following links, and not hidden there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tongwen.core.allowed_paths import resolve_inside
from tongwen.core.errors import RecipeError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a file, hidden ones, and links out of it and within it; beside it a secret."""
    top = tmp_path / "top"
    for name in ("sub/file.txt", ".hidden/key", "sub/.env", "../secret.txt", "../topmost/file.txt"):
        file = top / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("x", encoding="utf-8")
    (top / "out").symlink_to(tmp_path)
    (top / "leak.txt").symlink_to(tmp_path / "secret.txt")
    (top / "within.txt").symlink_to(top / "sub" / "file.txt")
    (top / "shown").symlink_to(top / ".hidden")
    (top / "loop").symlink_to(top / "loop")
    return top


def test_what_lies_inside_is_found_without_links(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = folder / "sub" / "file.txt"
    for name in (str(file), f"{folder}/sub/../sub//file.txt", str(folder / "within.txt")):
        assert resolve_inside([folder], name) == file
    monkeypatch.chdir(folder)
    assert resolve_inside([folder], "") == folder
    assert resolve_inside([folder], "sub/file.txt") == file
    assert resolve_inside([folder], "sub/new") == folder / "sub" / "new"
    assert resolve_inside([folder / ".hidden"], str(folder / ".hidden" / "key")).read_text() == "x"


@pytest.mark.parametrize(
    "name",
    [
        "..",
        "../secret.txt",
        "sub/../../secret.txt",
        "{top}/../secret.txt",
        "{top}most/file.txt",
        "/etc/passwd",
        "/proc/self/environ",
        "/proc/self/root/etc/passwd",
        "leak.txt",
        "out/secret.txt",
        "loop/x",
        ".hidden/key",
        "sub/.env",
        "shown/key",
        "~/secret.txt",
        "~root",
        "file:sub/file.txt",
        "file:///etc/passwd",
        "http://localhost/x",
        "HTTPS:x",
        "s3://bucket/x",
        "hub:owner/name",
        "modelscope:owner/name",
        "sub/file.txt\0",
        "\0",
        "x" * 300,
        "x/" * 5000,
        "\ud800",
        None,
        7,
        ["sub/file.txt"],
        {"path": "sub/file.txt"},
        b"sub/file.txt",
    ],
)
def test_everything_else_is_refused(name: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HOME", str(folder))
    given = name.format(top=folder) if isinstance(name, str) else name
    with pytest.raises(RecipeError, match="outside the folders") as refused:
        resolve_inside([folder], given)
    assert "\0" not in str(refused.value) and len(refused.value.place) < 1300
