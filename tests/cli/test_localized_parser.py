"""argparse's own words are in the user's language, for parsers of ours alone."""

from __future__ import annotations

import argparse
import ast
import inspect

import pytest

from tongwen.cli.localized_parser import ARGPARSE_MESSAGES, LocalizedParser

# What argparse tells a programmer.
INTERNAL = {
    "%(heading)s:",
    "%r is not callable",
    "'required' is an invalid argument for positionals",
    ".__call__() not defined",
    "cannot have multiple subparser arguments",
    "cannot merge actions - two groups are named %r",
    "conflicting option string: %s",
    "conflicting option strings: %s",
    "conflicting subparser alias: %s",
    "conflicting subparser: %s",
    "dest= is required for options like %r",
    "invalid conflict_resolution value: %r",
    "invalid option string %(option)r: must start with a character %(prefix_chars)r",
    "mutually exclusive arguments must be optional",
}


def make_parser(kind: type[argparse.ArgumentParser] = LocalizedParser) -> argparse.ArgumentParser:
    parser = kind(prog="p")
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run")
    run.add_argument("recipe")
    run.add_argument("--devices", type=int)
    run.add_argument("--only", choices=["sft", "merge"])
    return parser


def test_every_argparse_message_is_translated() -> None:
    """Fails with a Python whose argparse has new ones."""
    found = set()
    for node in ast.walk(ast.parse(inspect.getsource(argparse))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("_", "ngettext"):
            found |= {text.value for text in node.args if isinstance(text, ast.Constant)}
    assert len(found) > 30
    assert found - INTERNAL <= set(ARGPARSE_MESSAGES)


def test_help_is_in_chinese(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TONGWEN_LANG", "zh")
    parser = make_parser()
    text = parser.format_help()
    assert text.startswith("用法：p [-h]")
    assert "位置参数:\n" in text and "选项:\n" in text and "显示此帮助并退出" in text
    assert "usage" not in text and "options" not in text
    monkeypatch.setenv("TONGWEN_LANG", "en")
    english, theirs = make_parser().format_help(), make_parser(argparse.ArgumentParser).format_help()
    assert english == theirs and english.startswith("usage: p [-h]")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("run", "p run：错误：缺少必需的参数：recipe\n"),
        ("run r --devices", "p run：错误：参数 --devices：需要一个值\n"),
        ("run r --devices two", "p run：错误：参数 --devices：'two' 不是有效的 int 值\n"),
        ("run r --only prepare", "p run：错误：参数 --only：无效的选择：'prepare'（可选："),
        ("run r --nothing", "p：错误：无法识别的参数：--nothing\n"),
        ("", "p：错误：缺少必需的参数：command\n"),
        ("walk", "p：错误：参数 command：无效的选择：'walk'（可选："),
    ],
)
def test_errors_are_in_chinese(
    line: str, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TONGWEN_LANG", "zh")
    with pytest.raises(SystemExit) as ended:
        make_parser().parse_args(line.split())
    err = capsys.readouterr().err
    assert ended.value.code == 2 and err.startswith("用法：p") and message in err


def test_other_parsers_stay_english(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("TONGWEN_LANG", "zh")
    before = vars(argparse)["_"], vars(argparse)["ngettext"]
    with pytest.raises(SystemExit):
        make_parser().parse_args(["run"])
    assert (vars(argparse)["_"], vars(argparse)["ngettext"]) == before
    capsys.readouterr()
    with pytest.raises(SystemExit):
        make_parser(argparse.ArgumentParser).parse_args(["run"])
    err = capsys.readouterr().err
    assert "the following arguments are required: recipe" in err and err.startswith("usage: p run")
