"""A template of unknown origin renders under limits, and gives what it gives without them."""

from __future__ import annotations

import json
import os
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.core.templates import SPECIAL, TOKENS, TOOL
from tongwen.core import template_guard
from tongwen.core.chat_template import Template
from tongwen.core.errors import ModelError, RowRejected
from tongwen.core.records import Dialogue, Message, Origin
from tongwen.core.shipped_templates import shipped_source
from tongwen.core.template_guard import GUARD, Guard

CHATML = (
    shipped_source("chatml").replace("{% generation %}", "").replace("{% endgeneration %}", "").replace("@prefix@", "")
)
STRANGE = "{# of unknown origin #}" + CHATML
BOMBS = {
    "loop": ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "seconds"),
    "times": ("{% set x = 'a' * 3000000000 %}{{ x | length }}", "memory"),
    "doubling": (
        "{% set ns = namespace(x='a' * 1000) %}{% for i in range(23) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
        "memory",
    ),
    "long": ("{{ 'a' * 40000000 }}", "characters"),
    "list": ("{% set x = [1] * 500000000 %}", "memory"),
    "join": ("{% set x = (['a' * 1000] * 99999999) | join %}", "memory|seconds"),
    "power": ("{% set x = 9 ** (9 ** 9) %}", "seconds"),
}


def own(source: str) -> Template:
    return Template.make("own", source, TOKENS, SPECIAL)


def in_the_process(source: str, monkeypatch: pytest.MonkeyPatch) -> Template:
    with monkeypatch.context() as patch:
        patch.setattr(Guard, "is_possible", False)
        template = own(source)
        assert template._renders_here
        return template


def rows() -> list[Dialogue]:
    ask, answer = Message("user", "问题"), Message("assistant", "回答 <&>'\"\n")
    call = Message(
        "assistant", "", tool_calls=({"type": "function", "function": {"name": "f", "arguments": {"a": 1.5}}},)
    )
    shapes = [
        (ask, answer),
        (ask, answer, ask, answer),
        (Message("system", "x"), ask, replace(answer, thinking="想")),
        (ask, Message("assistant", "<b>标签</b>")),
        (ask, Message("assistant", "a<|im_end|>")),
        (ask,),
    ]
    out = [Dialogue(shape, Origin("f", number)) for number, shape in enumerate(shapes)]
    return [*out, Dialogue((ask, call), Origin("f", 9), (TOOL,))] * 40


@pytest.mark.parametrize("learn", ["assistant", "everything"])
def test_rows_are_rendered_as_in_the_process(learn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    here, there = in_the_process(STRANGE, monkeypatch), own(STRANGE)
    assert not there._renders_here and (here.stop, here.stops) == (there.stop, there.stops)
    expected, found = (one.samples_of_each(rows(), learn, "mixed") for one in (here, there))
    assert len(found) == len(expected) == 280
    kinds = set()
    for one, other in zip(found, expected, strict=True):
        kinds.add(type(one))
        if isinstance(other, RowRejected):
            assert isinstance(one, RowRejected) and (one.reason, one.rule) == (other.reason, other.rule)
        else:
            assert one == other
    assert kinds == {list, RowRejected}
    for row in rows()[:7]:
        try:
            assert there.samples(row, learn) == here.samples(row, learn)
        except RowRejected as error:
            with pytest.raises(RowRejected) as caught:
                here.samples(row, learn)
            assert caught.value.rule == error.rule
    assert there.prompt(rows()[2].messages[:-1]) == here.prompt(rows()[2].messages[:-1])


def test_only_our_own_templates_need_no_guard() -> None:
    assert Template.make("chatml", None, TOKENS, SPECIAL)._renders_here
    assert own(CHATML)._renders_here
    for changed in (STRANGE, CHATML + "{% for i in [] %}{% endfor %}", CHATML.replace("user", "USER")):
        assert not own(changed)._renders_here


@pytest.mark.parametrize("name", [*BOMBS])
def test_runaway_template_is_stopped_and_named(name: str) -> None:
    bomb, limit = BOMBS[name]
    began = time.monotonic()
    with pytest.raises(ModelError, match=rf"template own: the chat template was stopped: .*({limit})"):
        own(bomb + CHATML)
    assert psutil.Process().memory_info().rss < 3 << 30
    with pytest.raises(ModelError, match=limit):  # at once, the second time
        own(bomb + CHATML)
    assert time.monotonic() - began < 30
    assert not own(STRANGE)._renders_here  # the next template has a process again


def test_runaway_template_for_one_row_is_stopped_and_named() -> None:
    bomb = "{% if messages[0].content == 'BOOM' %}" + BOMBS["loop"][0] + "{% endif %}"
    template = own(bomb + CHATML)
    fine = Dialogue((Message("user", "a"), Message("assistant", "b")), Origin("f", 1))
    boom = Dialogue((Message("user", "BOOM"), Message("assistant", "b")), Origin("f", 2))
    assert template.samples_of_each([fine], "assistant", "mixed")[0]
    for act in (
        lambda: template.samples_of_each([fine, boom], "assistant", "mixed"),
        lambda: template.samples(boom),
        lambda: template.prompt(boom.messages[:1]),
    ):
        with pytest.raises(ModelError, match="more than 3 seconds"):
            act()


@pytest.mark.parametrize(
    ("source", "error", "said"),
    [
        ("{% if %}", ModelError, "not valid Jinja"),
        ("{{ raise_exception('no \x1b system') }}", ModelError, "no \x1b system"),
        ("{{ messages[0].content + 1 }}", ModelError, "TypeError"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", ModelError, "RecursionError"),
        ("{{ ''.__class__.__mro__ }}" + CHATML, ModelError, "unsafe"),
        ("{{ 1 / 0 }}", ModelError, "ZeroDivisionError"),
    ],
)
def test_template_error_keeps_its_type(source: str, error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        own(source)


def test_fork_has_a_process_of_its_own() -> None:
    template, row = own(STRANGE), rows()[2]
    expected = template.samples(row)
    child = os.fork()
    if not child:
        os._exit(0 if template.samples(row) == expected else 1)
    for _try in range(20):
        assert template.samples(row) == expected
    assert os.waitpid(child, 0)[1] == 0


def test_process_ends_with_its_parent_during_a_row(tmp_path: Path) -> None:
    child = os.fork()
    if not child:
        try:
            template = own(
                "{# fork #}{% if messages[0].content == 'BOOM' %}" + BOMBS["loop"][0] + "{% endif %}" + CHATML
            )
            assert GUARD._process
            (tmp_path / "pid").write_text(str(GUARD._process.pid))
            template.prompt([Message("user", "BOOM")])
        finally:  # a forked test must never return
            os._exit(1)
    while not (tmp_path / "pid").is_file() or not (tmp_path / "pid").read_text():
        time.sleep(0.05)
    process = psutil.Process(int((tmp_path / "pid").read_text()))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    process.wait(timeout=30)


def test_nothing_of_the_working_folder_is_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("jinja2", "json", "signal", "resource"):
        (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / 'canary')!r}, 'w')")
    monkeypatch.chdir(tmp_path)
    GUARD.close()
    assert not own(STRANGE)._renders_here
    assert not (tmp_path / "canary").exists()


def test_batches_have_limits() -> None:
    sizes = [[*map(len, batch)] for batch in template_guard._batches([{"a": "x" * 400_000}] * 7 + [{}] * 250)]
    assert all(len(batch) <= 100 and sum(batch) <= 1 << 20 for batch in sizes)
    assert sum(map(len, sizes)) == 257
    rows = [{"a": "中"}] * 3
    assert [json.loads(one) for batch in template_guard._batches(rows) for one in batch] == rows


def test_slow_machine_does_not_stop_a_template(monkeypatch: Any) -> None:
    """The limit is time of the processor, not of the clock: a process that was stopped for a while goes on."""
    template = own(STRANGE)
    assert GUARD._process
    process = psutil.Process(GUARD._process.pid)
    process.suspend()
    try:
        pid = os.fork()
        if not pid:
            time.sleep(4)
            process.resume()
            os._exit(0)
        assert template.samples(rows()[2])
    finally:
        process.resume()
        os.waitpid(pid, 0)
