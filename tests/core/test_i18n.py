"""Texts and their translations: the catalogue is complete and in step with the code, and looked up when a text is shown."""

from __future__ import annotations

import ast
import os
import re
import string
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from scripts import update_catalogue

from tongwen.core.i18n import N_, _, language, use_language

ROOT = Path(__file__).parents[2]
SOURCES = sorted([*(ROOT / "src").rglob("*.py"), *(ROOT / "scripts").glob("*.py")])
TEXT = "show this help message and exit"
CHINESE_DATA = {
    "src/tongwen/data/message_log.py",
    "src/tongwen/commands/clean.py",
    "src/tongwen/commands/demo.py",
    "src/tongwen/commands/init_project.py",
    "src/tongwen/commands/web.py",
    "src/tongwen/core/model_families.py",
    "src/tongwen/core/template_cache.py",
    "src/tongwen/data/charset.py",
    "src/tongwen/data/clean.py",
    "src/tongwen/data/encoder.py",
    "src/tongwen/data/formats.py",
    "src/tongwen/data/synthesis/generate.py",
    "src/tongwen/data/synthesis/parse.py",
    "src/tongwen/data/texts.py",
    "src/tongwen/data/tiktoken_encoder.py",
    "src/tongwen/data/turns.py",
    "src/tongwen/infer/entities.py",
    "src/tongwen/infer/multiple_choice.py",
    "src/tongwen/serving/web/api.py",
    "src/tongwen/train/loss_plot.py",
    "src/tongwen/vocab/measure.py",
    "src/tongwen/workflows/evaluation.py",
}
STATEMENTS = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
EXPRESSIONS = (ast.Lambda, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


# -- at run time ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, "en"),
        ({"LANG": "zh_CN.UTF-8"}, "zh"),
        ({"LANG": "zh_CN.UTF-8", "LC_ALL": "C"}, "en"),
        ({"LC_MESSAGES": "zh_TW", "LANG": "en_US"}, "zh"),
        ({"TONGWEN_LANG": "en", "LC_ALL": "zh_CN"}, "en"),
        ({"TONGWEN_LANG": "ZH", "LANG": "de_DE"}, "zh"),
    ],
)
def test_language_from_the_environment(
    variables: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("TONGWEN_LANG", "LC_ALL", "LC_MESSAGES", "LANG"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert language() == expected


def test_text_is_translated_at_display_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TONGWEN_LANG", "en")
    marked = N_(TEXT)
    assert _(marked) == TEXT
    with use_language("zh"):
        assert _(marked) == "显示此帮助并退出"
        with use_language("en"):
            assert _(marked) == TEXT
        assert _("") == "" and _("a text that no catalogue has") == "a text that no catalogue has"
    assert _(marked) == TEXT


def test_english_loads_no_catalogue() -> None:
    code = f"from tongwen.core import i18n; print(i18n._({TEXT!r}), i18n._chinese.cache_info().currsize)"
    for chosen, expected in (("en", f"{TEXT} 0"), ("zh", "显示此帮助并退出 1")):
        ran = subprocess.run(
            [sys.executable, "-c", code], env={**os.environ, "TONGWEN_LANG": chosen}, capture_output=True, check=True
        )
        assert ran.stdout.decode().strip() == expected


# -- the catalogue -------------------------------------------------------------------------------------------------


def test_catalogue_matches_the_code() -> None:
    """`make messages` mends it: every text of the code is there, no other is, and the .mo is made from the .po."""
    catalog = update_catalogue.updated()
    assert update_catalogue.PO.read_bytes() == update_catalogue.po_of(catalog)
    assert update_catalogue.MO.read_bytes() == update_catalogue.mo_of(catalog)


def test_every_text_has_a_translation() -> None:
    entries = [entry for entry in update_catalogue.saved() if entry.id]
    assert len(entries) >= 30
    assert not [entry.id for entry in entries if not entry.string or entry.fuzzy]
    assert not update_catalogue.saved().obsolete


def test_translation_has_the_same_placeholders() -> None:
    """Names, conversions and formats: {rank}, {value!r}, {share:.1%}, %(prog)s."""
    for entry in update_catalogue.saved():
        for pattern in (r"\{\w*(?:![rsa])?(?::[^{} ]*)?\}", r"%(?:\(\w+\))?[rs]"):
            theirs, ours = (sorted(set(re.findall(pattern, str(text)))) for text in (entry.id, entry.string))
            assert theirs == ours, entry.id


# -- the code ------------------------------------------------------------------------------------------------------


def test_texts_are_literals_formatted_after_translation() -> None:
    """An f-string, or a text that was formatted already, is in no catalogue."""
    for file, tree in trees():
        for call in calls(tree):
            (text,) = call.args
            assert not isinstance(text, (ast.JoinedStr, ast.BinOp)), (file, call.lineno)
            assert not (isinstance(text, ast.Call) and getattr(text.func, "attr", "") == "format"), (file, call.lineno)
            assert not (isinstance(text, ast.Constant) and not text.value), (file, call.lineno)


def test_format_arguments_match_the_placeholders() -> None:
    for file, tree in trees():
        for node in ast.walk(tree):
            method = node.func if isinstance(node, ast.Call) else None
            if not isinstance(method, ast.Attribute) or method.attr != "format" or not is_translated(method.value):
                continue
            named = {keyword.arg for keyword in node.keywords}
            assert not node.args, (file, node.lineno)
            text = method.value.args[0]
            if isinstance(text, ast.Constant) and None not in named:  # neither a table's text nor **values
                assert named == placeholders(text.value), (file, node.lineno)


def test_no_variable_shadows_gettext() -> None:
    """After `for _ in …` the call `_("…")` would call a number. A comprehension has a scope of its own."""
    for file, tree in trees():
        for scope in ast.walk(tree):
            if isinstance(scope, STATEMENTS) or (isinstance(scope, EXPRESSIONS) and any(calls(scope))):
                bound = [node.lineno for node in own_nodes(scope) if isinstance(node, ast.Name) and is_bound(node)]
                assert not bound, (file, bound)


def trees() -> Iterator[tuple[str, ast.Module]]:
    """Of the modules that import `_`."""
    for file in SOURCES:
        source = file.read_text(encoding="utf-8")
        if re.search(r"from tongwen\.core\.i18n import .*\b_\b", source):
            yield str(file.relative_to(ROOT)), ast.parse(source)


def is_translated(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "_"


def calls(tree: ast.AST) -> Iterator[ast.Call]:
    yield from (node for node in ast.walk(tree) if is_translated(node))  # type: ignore[misc]


def own_nodes(scope: ast.AST) -> Iterator[ast.AST]:
    """Nodes of a scope, without those of the scopes inside."""
    waiting = list(ast.iter_child_nodes(scope))
    while waiting:
        node = waiting.pop()
        yield node
        if not isinstance(node, (*STATEMENTS, *EXPRESSIONS)):
            waiting += ast.iter_child_nodes(node)


def is_bound(name: ast.Name) -> bool:
    return name.id == "_" and isinstance(name.ctx, ast.Store)


def placeholders(text: str) -> set[str]:
    """Also those inside of a format: {value:>{width}}."""
    found = set()
    for _text, name, form, _conversion in string.Formatter().parse(text):
        if name is not None:
            found |= {re.split(r"[.\[]", name)[0], *placeholders(form or "")}
    return found


def test_messages_in_the_code_are_english() -> None:
    """Chinese is in the catalogue. The modules of CHINESE_DATA handle Chinese text: its characters, prompts, columns."""
    found = set()
    for file in SOURCES:
        tree = ast.parse(file.read_text(encoding="utf-8"))
        docstrings = {
            id(node.body[0].value)
            for node in ast.walk(tree)
            if isinstance(node, STATEMENTS) and node.body and isinstance(node.body[0], ast.Expr)
        }
        texts = (node for node in ast.walk(tree) if isinstance(node, ast.Constant) and id(node) not in docstrings)
        if any(isinstance(text.value, str) and re.search("[\u4e00-\u9fff]", text.value) for text in texts):
            found.add(str(file.relative_to(ROOT)))
    assert found == CHINESE_DATA
