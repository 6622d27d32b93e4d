"""Text that any terminal takes: nothing in it is obeyed, and no encoding ends a command."""

from __future__ import annotations

import io
import json
import sys

import pytest

from tongwen.core import console
from tongwen.core.terminal_text import UNSAFE, use_any_encoding, visible

HOSTILE = "a\\[/b] [bold red]x[/] \\[/x] [link=http://x]y[/link] :smile: \x1b]0;title\x07 \x9b2J \r \x08 \u202e \udcff"


@pytest.mark.parametrize("say", [console.info, console.notice, console.success, console.error, console.header])
def test_foreign_text_is_shown_escaped(say: object, capsys: pytest.CaptureFixture[str]) -> None:
    say(HOSTILE)  # type: ignore[operator]
    said = "".join(capsys.readouterr())
    assert visible(HOSTILE) in said
    for kept in ("\\[/b]", "[bold red]x[/]", "[link=http://x]y[/link]", ":smile:"):
        assert kept in said
    assert not {*"\x1b\x07\x9b\r\x08\u202e\udcff"} & {*said}


def test_tables_and_headers_show_foreign_text_escaped(capsys: pytest.CaptureFixture[str]) -> None:
    hostile = "\\[/x][red]\x1b[2J"
    console.table((hostile, "b"), [(hostile, hostile)], title=hostile)
    console.header("title", hostile)
    with console.progress(1, hostile) as bar:
        bar.update(1, hostile)
    assert capsys.readouterr().out.count("\\[/x][red]\\x1b[2J") == 7


@pytest.mark.parametrize(
    ("encoding", "shown"),
    [
        ("gbk", "+ 数据 \\U0001f600 -> x · …"),
        ("latin-1", "+ \\u6570\\u636e \\U0001f600 -> x · ..."),
        ("ascii", "+ \\u6570\\u636e \\U0001f600 -> x - ..."),
        ("utf-8", "✓ 数据 😀 → ✗ · …"),
    ],
)
def test_symbols_fall_back_in_limited_encodings(encoding: str, shown: str, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding=encoding, write_through=True)
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setattr(sys, "stderr", stream)
    use_any_encoding()
    console.success("数据 😀 → ✗ · …")
    print("\udcff")
    expected = f"{shown}\n\\udcff\n" if encoding != "gbk" else f"{shown}\n\\udcff\n".replace("->", "→")
    assert raw.getvalue().decode(encoding) == expected


def test_json_output_holds_no_terminal_escape(monkeypatch: pytest.MonkeyPatch) -> None:
    value = {"error": "a\x9b2J\x7f\u202eb\ud800 你好"}
    out = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(console.SCREEN, "json", True)
    console.emit(value)
    text = out.buffer.getvalue().decode()  # type: ignore[attr-defined]
    assert not UNSAFE.search(text) and json.loads(text) == value and "你好" in text


@pytest.mark.parametrize("encoding", ["gbk", "latin-1", "ascii", "utf-8"])
def test_json_output_is_equal_in_any_encoding(encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding=encoding, write_through=True))
    monkeypatch.setattr(console.SCREEN, "json", True)
    use_any_encoding()
    value = {"路径": "数据 😀 \udcff é \\"}
    console.emit(value)
    assert json.loads(raw.getvalue().decode(encoding)) == value
