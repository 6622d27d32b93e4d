"""Rows with tools take the fast way, and get what the template writes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from tests.core.templates import HERE, SPECIAL, TOKENS, TOOL, own_template
from tests.core.tool_templates import SMALL, bound, published
from tongwen.core.chat_template import Template
from tongwen.core.errors import ModelError, RowRejected
from tongwen.core.records import Dialogue, Message
from tongwen.core.template_cache import RenderSkeleton, dump_json, outline

HOSTILE = ["北京", " 前后空白 ", "a'b\"c\\", "行\n\n</b>", "{{ x }}", "<think>", "123456789"]
PUBLISHED = dict(published())


def row(text: str, other: str, **call: Any) -> Dialogue:
    """A question, a call with its answer, and two calls whose answers come in the other order."""

    def made(name: str, id_: str, **arguments: Any) -> dict[str, Any]:
        return {"id": id_, "type": "function", "function": {"name": name, "arguments": arguments}} | call

    first, second, third = (f"call_{text}_{number}"[:40] for number in range(3))
    return Dialogue(
        (
            Message("user", text),
            Message("assistant", "", tool_calls=(made("get_weather", first, city=other, days=3),)),
            Message("tool", other, name="get_weather", tool_call_id=first),
            Message("assistant", text),
            Message("user", other),
            Message(
                "assistant",
                other,
                tool_calls=(
                    made("get_weather", second, city=text),
                    made("get_weather", third, city={"in": [text, True]}),
                ),
            ),
            Message("tool", text, name="get_weather", tool_call_id=third),
            Message("tool", other, name="get_weather", tool_call_id=second),
            Message("assistant", "答" + text),
        ),
        HERE,
        (TOOL,),
    )


def agree(template: Template, dialogue: Dialogue) -> None:
    outcomes = []
    for render in (template.samples, lambda one: template._samples(one, "assistant", "mixed")):
        try:
            outcomes.append([sample.spans for sample in render(dialogue)])
        except (RowRejected, ModelError) as error:
            outcomes.append(type(error))
    assert outcomes[0] == outcomes[1], dialogue


def check(template: Template) -> bool:
    """Whether rows of one shape got a skeleton; whatever they got is what a render of their own gives."""
    template = replace(template, name="chatml") if template.name == "own" else template  # renders in this process
    for turn, text in enumerate(HOSTILE * 2):
        dialogue = row(text, HOSTILE[(turn + 3) % len(HOSTILE)])
        agree(template, dialogue)
        agree(template, replace(dialogue, messages=dialogue.messages[:4]))
    return any(isinstance(found, RenderSkeleton) for found in template.skeletons.values())


def test_rows_with_tools_are_filled_in() -> None:
    assert check(Template.make("chatml", None, TOKENS, SPECIAL))


@pytest.mark.sample("hermes")
@pytest.mark.parametrize("name", SMALL)
def test_forms_of_calls(name: str) -> None:
    check(bound(SMALL[name]))


@pytest.mark.sample("qwen3", "gptoss", "lfm2_2_5", "deepseekv3", "gemma4", "llama3_1")
@pytest.mark.parametrize("name", PUBLISHED)
def test_published_templates(name: str) -> None:
    try:
        template = bound(PUBLISHED[name])
    except ModelError:
        pytest.skip("the template is refused as a whole")
    check(template)


def test_what_is_not_text_is_part_of_the_shape() -> None:
    def shape(value: Any) -> Any:
        call = {"type": "function", "function": {"name": "f", "arguments": {"x": value}}}
        return outline((Message("assistant", "", tool_calls=(call,)),))

    assert shape("a") == shape("b")
    values = [1, 1.0, True, None, "", " ", "a", [], ["a"], ["a", "b"], {}, {"a": "b"}, 2]
    assert len({shape(value) for value in values}) == len(values)


def test_equal_ids_are_part_of_the_shape() -> None:
    """An answer is written by the name of the call whose id it has."""
    one, other = row("一", "二").messages, row("三", "四").messages
    assert outline(one) == outline(other)
    crossed = (
        *one[:6],
        replace(one[6], tool_call_id=one[7].tool_call_id),
        replace(one[7], tool_call_id=one[6].tool_call_id),
        one[8],
    )
    assert outline(crossed) != outline(one)


def test_a_condition_on_a_text_in_json_has_no_skeleton() -> None:
    """Its length, for example, differs between rows of one shape."""
    source = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content }}{% for c in m.tool_calls or [] %}"
        "{% set text = c.function.arguments | tojson %}{{ c.function.name + text }}{% if text | length > 40 %}{{ ' long' }}{% endif %}"
        "{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
        "{{ tools | tojson if tools and not messages else '' }}"
    )
    template = replace(own_template(source), name="chatml")
    for city in ("北", "京", "北京", "长" * 60, "短"):
        call = {"type": "function", "function": {"name": "f", "arguments": {"city": city}}}
        agree(template, Dialogue((Message("user", "问"), Message("assistant", "", tool_calls=(call,))), HERE))
    assert not any(isinstance(found, RenderSkeleton) for found in template.skeletons.values())


def test_ordinary_values_are_written_as_json_writes_them() -> None:
    assert dump_json({"a": "中\ufdd2", "b": [1]}, indent=1) == '{\n "a": "中\ufdd2",\n "b": [\n  1\n ]\n}'
    assert dump_json("中\ufdd2", ensure_ascii=True) == '"\\u4e2d\\ufdd2"'
