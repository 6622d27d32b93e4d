"""Calls are read back in the form in which a template writes them, whatever the template; nothing of an answer is lost.

The judges are the templates' own renders: those that TRL ships, those of the archives in TONGWEN_TEMPLATES (see
bench/templates.py), and small ones here that write as published ones do.
"""

from __future__ import annotations

import importlib.util
import json
import time
from typing import Any

import pytest

from tests.core.tool_templates import SMALL, TOOLS, bound, published
from tongwen.core import harmony
from tongwen.core.answer_form import AnswerForm, find_answer_form
from tongwen.core.chat_template import Template
from tongwen.core.errors import ModelError, RowRejected
from tongwen.core.tool_parser import ToolParser, schemas_of
from tongwen.serving.stream_split import StreamPart, split_calls

ARGUMENTS: list[dict[str, Any]] = [
    {"city": "北京", "days": 3},
    {"city": "007"},  # a text that looks like a number
    {"code": 'def f():\n    return "a"\n\n# <b>ü</b>', "exact": True},
    {"filter": {"a": [1, 2.5], "b": {"c": "d"}}, "tags": ["x", "y z"]},
    {},
]


def call(arguments: dict[str, Any], name: str = "get_weather", number: int = 1) -> dict[str, Any]:
    return {"id": f"abcd1234{number}", "type": "function", "function": {"name": name, "arguments": arguments}}


CALLS = [*([call(one)] for one in ARGUMENTS), [call(ARGUMENTS[0]), call(ARGUMENTS[1], "search_docs", 2)]]


def written(template: Template, content: str, calls: list[dict[str, Any]]) -> tuple[str, str] | None:
    """(prompt, answer) as the template writes them; None where it refuses."""
    for tools in (TOOLS, []):
        try:
            turn = template.answer(
                [{"role": "user", "content": "Q"}, {"role": "assistant", "content": content, "tool_calls": calls}],
                tools,
            )
        except RowRejected:
            continue
        return turn.prompt, turn.answer
    return None


def check_round_trip(template: Template) -> int:
    """Assert that the calls of every answer are read back; return how many answers there were."""
    form, count = find_answer_form(template), 0
    assert isinstance(form.tools, ToolParser)
    for calls in CALLS:
        for content in ("", "好的。"):
            if content and form.tools.anchored:  # a call without marks is one by its place alone
                continue
            if (found := written(template, content, calls)) is None:
                continue
            text = "".join(form.plain(iter(found[1])))
            made, rest = form.tools.read(text, schemas_of(TOOLS))
            assert [(one.name, json.loads(one.arguments)) for one in made] == [
                (one["function"]["name"], one["function"]["arguments"]) for one in calls
            ], text
            assert content in rest or content not in found[1], text
            count += 1
    return count


@pytest.mark.parametrize("name", SMALL)
def test_calls_of_small_templates_are_read_back(name: str) -> None:
    assert check_round_trip(bound(SMALL[name])) >= (5 if name == "bare" else 10)


def test_calls_of_our_own_templates_are_read_back() -> None:
    for name in ("chatml", "plain"):
        template = Template.make(name, None, {"eos_token": "</s>"}, ["<|im_start|>", "<|im_end|>", "</s>"])
        assert check_round_trip(template) == 12


@pytest.mark.parametrize("all_of_them", [False, True], ids=["families", "all"])
@pytest.mark.sample("families")
def test_calls_of_published_templates_are_read_back(all_of_them: bool) -> None:
    families = ("qwen3", "qwen3_6", "gptoss", "glm4moe", "gemma4", "deepseekv3", "llama3_2", "gemma3")
    read: dict[str, int] = {}
    refused: dict[str, str] = {}
    for name, source in published():
        if not all_of_them and name not in families:
            continue
        try:
            template = bound(source)
        except ModelError:
            continue
        form = find_answer_form(template)
        if isinstance(form.tools, str):
            refused[name] = form.tools
        elif not name.startswith(("lfm2_2_5", "LFM2")):  # writes its texts without escaping the quotes inside them
            read[name] = check_round_trip(template)
    if not read:
        pytest.skip("no published templates here")
    assert min(read.values()) >= 2
    assert set(families) - {"gemma3"} <= read.keys() or not importlib.util.find_spec("trl"), refused
    assert set(refused.values()) <= {
        "the chat template writes no calls",
        "the form in which the chat template writes calls is not understood",
    }


def parser(name: str = "chatml") -> ToolParser:
    template = Template.make(name, None, {"eos_token": "</s>"}, ["<|im_start|>", "<|im_end|>", "</s>"])
    found = find_answer_form(template).tools
    assert isinstance(found, ToolParser)
    return found


WHOLE = '<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>'


@pytest.mark.parametrize(
    ("text", "names", "rest"),
    [
        (WHOLE[:30], [], WHOLE[:30]),
        (WHOLE + "\n" + WHOLE[:30], ["f"], WHOLE[:30]),
        ("好" + WHOLE + "完", ["f"], "好完"),
        ("write <tool_call> around it. " + WHOLE, ["f"], "write <tool_call> around it."),
        ('<tool_call>{"name":"f","arguments":{"x":1}}</tool_call>', ["f"], ""),
        ('<tool_call>{"name": "f"}</tool_call>', ["f"], ""),
        ('<tool_call>{"name": "f", "arguments": "{\\"x\\": 1}"}</tool_call>', ["f"], ""),
        ('<tool_call>{"name": 7, "arguments": {}}</tool_call>', [], None),
        ('<tool_call>{"name": "f", "arguments": [1]}</tool_call>', [], None),
        ('<tool_call>{"name": "f", "arguments": {x: 1}}</tool_call>', [], None),
        ('<tool_call>{"name": "g", "arguments": {"doc": "' + WHOLE.replace('"', '\\"') + '"', [], None),
        ("<tool_call>" + "[" * 100_000, [], None),
        ('<tool_call>{"name": "f", "arguments": {"a": "1\n2"}}</tool_call>', ["f"], ""),
        (WHOLE[:-12], ["f"], ""),
    ],
)  # fmt: skip
def test_broken_calls_are_text_and_whole_ones_are_calls(text: str, names: list[str], rest: str | None) -> None:
    calls, content = parser().read(text, {})
    assert [one.name for one in calls] == names
    assert content == (text if rest is None else rest)


def test_untyped_arguments_follow_the_schema() -> None:
    """Qwen3-coder's form: no value says its own type."""
    source = next((source for name, source in published() if name == "qwen3_6"), "")
    if not source:
        pytest.skip("TRL is not installed")
    found = find_answer_form(bound(source)).tools
    assert isinstance(found, ToolParser)
    text = (
        "<tool_call>\n<function=f>\n<parameter=a>\n12\n</parameter>\n<parameter=b>\n12\n</parameter>\n"
        "<parameter=c>\nTrue\n</parameter>\n<parameter=d>\n  x\n\n  y\n</parameter>\n</function>\n</tool_call>"
    )
    schemas = {"f": {"a": {"type": "string"}, "b": {"type": ["integer", "null"]}, "c": {"type": "boolean"}}}
    (made,), _rest = found.read(text, schemas)
    assert json.loads(made.arguments) == {"a": "12", "b": 12, "c": True, "d": "  x\n\n  y"}


def test_channels_are_separated_wherever_the_recipient_stands() -> None:
    answer = (
        "<|channel|>analysis<|message|>想<|end|><|start|>assistant<|channel|>commentary<|message|>先看。<|end|>"
        '<|start|>assistant{}<|message|>{{"city": "北京"}}<|call|>'
    )
    for header in (
        "<|channel|>commentary to=functions.f <|constrain|>json",
        " to=functions.f<|channel|>commentary json",
        "<|channel|>commentary to=functions.f",
    ):
        for size in (1, 5, 1000):
            text = answer.format(header)
            pieces = (text[at : at + size] for at in range(0, len(text), size))
            plain = "".join(harmony.plain_messages(pieces))
            assert plain.startswith("<think>想</think>先看。"), plain
            calls, rest = harmony.tool_parser().read(plain.partition("</think>")[2], {})
            assert [tuple(one) for one in calls] == [("f", '{"city": "北京"}')] and rest == "先看。"
    final = "<|channel|>analysis<|message|>想<|end|><|start|>assistant<|channel|>final<|message|>答 <| 案"
    assert "".join(harmony.plain_messages(iter(final))) == "<think>想</think>答 <| 案"
    assert "".join(harmony.plain_messages(iter(final[:30]))).startswith("<think>")
    assert "".join(harmony.plain_messages(iter("words without a channel"))) == "words without a channel"


@pytest.mark.parametrize("size", [1, 3, 100])
def test_other_marks_of_thinking_become_the_usual_ones(size: int) -> None:
    form = AnswerForm(thinking=("[THINK]", "[/THINK]"))
    for text, wanted in (
        ("[THINK]想[/THINK]答", "<think>想</think>答"),
        ("\n[THINK]想", "<think>想"),
        ("答[THINK]", "答[THINK]"),
        ("[THI", "[THI"),
        ("", ""),
    ):
        assert "".join(form.plain(text[at : at + size] for at in range(0, len(text), size))) == wanted


def test_long_answers_are_read_in_linear_time() -> None:
    """Every piece of a stream is looked at, and a text in it may hold any number of brackets."""
    for name in ("keyword", "mistral-v3", "function-tag"):
        found = find_answer_form(bound(SMALL[name])).tools
        assert isinstance(found, ToolParser)
        arguments = {"code": ") ( { < > [" * 6000}
        answer = written(bound(SMALL[name]), "", [call(arguments)])
        assert answer
        began = time.process_time()
        pieces = (StreamPart(answer[1][at : at + 8]) for at in range(0, len(answer[1]), 8))
        calls = [part.call for part in split_calls(pieces, found, TOOLS) if part.call]
        assert [json.loads(one.arguments) for one in calls] == [arguments]
        assert time.process_time() - began < 5
