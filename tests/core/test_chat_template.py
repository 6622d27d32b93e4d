"""Chat templates: the answer and its stop token are learned; a template that cannot be checked is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tests.core.templates import (
    HERE,
    LLAMA3,
    SPECIAL,
    TOKENS,
    TOOL,
    learned,
    make_dialogue,
    own_template,
    tool_call_dialogue,
)
from tongwen.core.chat_template import Template
from tongwen.core.errors import ModelError, RowRejected
from tongwen.core.records import Dialogue, Message
from tongwen.core.shipped_templates import SHIPPED, shipped_source

ANYWHERE = tuple(name for name in SHIPPED if name != "chatglm")  # that one has tokens of its own: see test_chatglm

GLM4 = (
    "[gMASK]<sop>{% for message in messages %}{% if message['role'] == 'user' %}<|user|>\n{{ message['content'] }}"
    "{% else %}<|assistant|>\n{{ message['content'] }}{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
MISTRAL = "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}{% else %}{{ ' ' + message['content'] + eos_token }}{% endif %}{% endfor %}"
QWEN3 = (
    "{%- set ns = namespace(last=0) -%}{%- for message in messages %}{%- if message.role == 'user' %}{%- set ns.last = loop.index0 %}{%- endif %}{%- endfor %}"
    "{%- for message in messages %}{%- if message.role == 'assistant' %}{%- set content = message.content %}{%- set thought = message.reasoning_content if message.reasoning_content is string else '' %}"
    "{%- if loop.index0 > ns.last and (loop.last or thought) %}{{- '<|im_start|>assistant\n<think>\n' + thought.strip('\n') + '\n</think>\n\n' + content.lstrip('\n') }}"
    "{%- else %}{{- '<|im_start|>assistant\n' + content }}{%- endif %}{{- '<|im_end|>\n' }}"
    "{%- else %}{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}{%- endif %}"
)


@pytest.mark.parametrize("name", ANYWHERE)
def test_shipped_templates_learn_answer_and_stop(name: str) -> None:
    template = Template.make(name, None, TOKENS, SPECIAL, prefix="<s>")
    dialogue = make_dialogue("问一", "答一", "问二", " 答二 ")
    (sample,) = template.samples(dialogue)
    assert learned(template, dialogue) == [f"答一{template.stop} 答二 {template.stop}"]
    assert sample.text.count("<s>") == 1
    assert sample.text.startswith("<s>")
    assert "endgeneration" not in template.source
    assert template.prompt(dialogue.messages[:3]) == sample.text[: sample.text.rindex(" 答二")]


@pytest.mark.parametrize(
    ("source", "stop", "appended"),
    [(LLAMA3, "<|eot_id|>", False), (GLM4, "<|user|>", True), (MISTRAL, "</s>", False), (QWEN3, "<|im_end|>", False)],
)
def test_stop_token_is_found_in_the_model_template(source: str, stop: str, appended: bool) -> None:
    template = own_template(source)
    assert (template.stop, template.appended) == (stop, appended)
    assert template.source == source
    (sample,) = template.samples(make_dialogue("问一", "答一"))
    assert sample.spans[-1].text == stop
    assert sample.spans[-1].learn and sample.spans[-1].stop


def test_glm4_learns_the_next_user_token_after_each_answer() -> None:
    (sample,) = own_template(GLM4).samples(make_dialogue("问一", "答一", "问二", "答二"))
    assert learned(own_template(GLM4), make_dialogue("问一", "答一", "问二", "答二")) == ["答一<|user|>答二<|user|>"]
    assert sample.text == "[gMASK]<sop><|user|>\n问一<|assistant|>\n答一<|user|>\n问二<|assistant|>\n答二<|user|>"


def test_trimming_template_learns_the_trimmed_answer() -> None:
    assert learned(own_template(LLAMA3), make_dialogue("问", "  答  ")) == ["答<|eot_id|>"]


def test_thinking_off_puts_the_empty_block_in_the_prompt() -> None:
    (sample,) = own_template(QWEN3).samples(make_dialogue("问", "答", thinking="想"), thinking="off")
    assert sample.spans[0].text.endswith("<think>\n\n</think>\n\n")
    assert sample.spans[1].text == "答"


def test_thinking_is_learned_if_the_row_has_it() -> None:
    assert learned(own_template(QWEN3), make_dialogue("问", "答", thinking="想")) == [
        "<think>\n想\n</think>\n\n答<|im_end|>"
    ]
    assert learned(own_template(QWEN3), make_dialogue("问", "答")) == ["答<|im_end|>"]
    with pytest.raises(RowRejected) as caught:
        own_template(QWEN3).samples(make_dialogue("问", "答"), thinking="on")
    assert caught.value.reason == "no_thinking"


def test_dropped_thinking_gives_one_sample_per_turn() -> None:
    turns = (
        Message("user", "问一"),
        Message("assistant", "答一", "想一"),
        Message("user", "问二"),
        Message("assistant", "答二", "想二"),
    )
    samples = own_template(QWEN3).samples(Dialogue(turns, HERE))
    assert len(samples) == 2
    assert "想一" in samples[0].text
    assert "想一" not in samples[1].text, "what inference would not see, training does not see"
    for sample, end in zip(samples, (1, 3), strict=True):
        assert sample.spans[0].text == own_template(QWEN3).prompt(turns[:end], thinking=True)


def test_thinking_is_kept_by_a_template_without_thinking() -> None:
    assert learned(own_template(LLAMA3), make_dialogue("问", "答", thinking="想")) == [
        "<think>\n想\n</think>\n\n答<|eot_id|>"
    ]


def test_learn_selects_the_trained_turns() -> None:
    template = Template.make("chatml", None, TOKENS, SPECIAL)
    dialogue = make_dialogue("问一", "答一", "问二", "答二")
    assert learned(template, dialogue, learn="last_answer") == ["答二<|im_end|>"]
    assert learned(template, dialogue, learn="everything")[0].count("问") == 2
    silent = Dialogue((dialogue.messages[0], Message("assistant", "答一", learn=False), *dialogue.messages[2:]), HERE)
    assert learned(template, silent) == ["答二<|im_end|>"]


R1 = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '<|user|>' + m.content }}{% elif m.role == 'assistant' %}"
    "{% set c = m.content %}{% if '</think>' in c %}{% set c = c.split('</think>')[-1] %}{% endif %}{{ '<|assistant|>' + c + '</s>' }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|><think>\n' }}{% endif %}"
)
V31 = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ '<|user|>' + m.content }}{% elif m.role == 'assistant' %}"
    "{{ '<|assistant|></think>' + m.content.split('</think>')[-1] + '</s>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% if thinking %}{{ '<think>' }}{% else %}{{ '</think>' }}{% endif %}{% endif %}"
)
HARMONY = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ '<|user|>' + m.content + '<|im_end|>' }}{% elif m.role == 'assistant' %}{{ '<|im_start|>assistant' }}"
    "{% if loop.last %}{% if m.thinking %}{{ '<|assistant|>analysis:' + m.thinking + '<|im_end|><|im_start|>assistant' }}{% endif %}"
    "{{ '<|assistant|>final:' + m.content + '<|eot_id|>' }}{% else %}{{ '<|assistant|>final:' + m.content + '<|im_end|>' }}{% endif %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant' }}{% endif %}"
)
GEMMA4 = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|im_start|>assistant\n' }}{% if not enable_thinking %}{{ '<|channel>thought\n<channel|>' }}{% endif %}{% endif %}"
)
SYSTEM_LAST = (
    "{% if messages[0].role == 'system' %}{% set system = messages[0].content %}{% endif %}{% for m in messages %}"
    "{% if m.role == 'user' %}{{ '<|user|>' }}{% if loop.last and system is defined %}{{ system + '\n' }}{% endif %}{{ m.content + '<|eot_id|>' }}"
    "{% elif m.role == 'assistant' %}{{ m.content + '</s>' }}{% endif %}{% endfor %}"
)


@pytest.mark.parametrize(
    ("source", "with_thinking", "without"),
    [
        (R1, "想\n</think>\n\n答</s>", "\n</think>\n\n答</s>"),
        (V31, "想</think>答</s>", "答</s>"),
        (HARMONY, "<|assistant|>analysis:想<|im_end|><|im_start|>assistant<|assistant|>final:答<|eot_id|>", "<|assistant|>final:答<|eot_id|>"),
    ],
)  # fmt: skip
def test_answer_continues_the_inference_prompt(source: str, with_thinking: str, without: str) -> None:
    template = own_template(source)
    for thinking, wanted in (("想", with_thinking), (None, without)):
        dialogue = make_dialogue("问一", "答", "问", "答", thinking=thinking)
        samples = template.samples(dialogue)
        last = samples[-1]
        assert learned(template, dialogue)[-1].endswith(wanted)
        assert last.spans[-1].stop and last.text.endswith(wanted)
        begin = template.prompt(dialogue.messages[:3], thinking=bool(thinking))
        assert last.text == begin + wanted, "as at inference"


def test_template_with_several_stop_tokens() -> None:
    template = own_template(HARMONY)
    assert (template.stop, template.stops) == ("<|eot_id|>", ("<|eot_id|>", "<|im_end|>"))
    first, second = template.samples(make_dialogue("问一", "答一", "问二", "答二"))
    assert first.text.endswith("答一<|eot_id|>") and "答一<|im_end|>" in second.text
    assert "<|eot_id|>" not in second.text.split("问二")[0]


def test_answer_without_thinking_follows_the_empty_block() -> None:
    (sample,) = own_template(GEMMA4).samples(make_dialogue("问", "答"))
    assert sample.spans[0].text.endswith("<|channel>thought\n<channel|>") and sample.spans[1].text == "答"


def test_system_text_added_to_the_last_question_is_in_the_prompt() -> None:
    turns = (Message("system", "系统"), Message("user", "问"), Message("assistant", "答"))
    (sample,) = own_template(SYSTEM_LAST).samples(Dialogue(turns, HERE))
    assert sample.text == "<|user|>系统\n问<|eot_id|>答</s>"


def test_closing_think_tag_alone_is_split_or_refused() -> None:
    opened = own_template(
        QWEN3.replace(
            "{%- set thought =",
            "{%- if '</think>' in content %}{{- raise_exception('split it') }}{%- endif %}{%- set thought =",
        )
    )
    assert learned(opened, make_dialogue("问", "想\n</think>\n\n答")) == ["<think>\n想\n</think>\n\n答<|im_end|>"]


@pytest.mark.parametrize("name", ["chatml", "plain"])
@pytest.mark.parametrize("cities", [("北京",), ("北京", '上"海')])
@pytest.mark.parametrize("content", ["", "我查一下"])
def test_shipped_templates_render_tools_and_learn_calls(name: str, cities: tuple[str, ...], content: str) -> None:
    template = Template.make(name, None, TOKENS, SPECIAL)
    (sample,) = template.samples(tool_call_dialogue(*cities, content=content))
    (taught,) = learned(template, tool_call_dialogue(*cities, content=content))
    for city in cities:
        call = json.dumps({"name": "get_weather", "arguments": {"city": city}}, ensure_ascii=False)
        assert f"<tool_call>\n{call}\n</tool_call>" in taught
        assert f"<tool_response>\n{city}晴\n</tool_response>" in sample.text and f"{city}晴" not in taught
    assert taught.startswith(content) and taught.endswith(f"答{template.stop}")
    assert f"<tools>\n{json.dumps(TOOL, ensure_ascii=False)}\n</tools>" in sample.spans[0].text
    assert sample.spans[0].text == template.prompt(tool_call_dialogue(*cities).messages[:1], (TOOL,))


@pytest.mark.parametrize(
    ("dialogue", "part"),
    [
        (tool_call_dialogue("北京"), "the tool 'get_weather'"),
        (Dialogue(tool_call_dialogue("北京").messages, HERE), "turn 2: the call of 'get_weather'"),
        (Dialogue((Message("user", "问"), Message("assistant", "答")), HERE, (TOOL,)), "the tool 'get_weather'"),
    ],
)
def test_unrendered_parts_are_refused_by_name(dialogue: Dialogue, part: str) -> None:
    template = own_template(LLAMA3)
    with pytest.raises(RowRejected) as caught:
        template.samples(dialogue)
    assert caught.value.reason == "part_lost" and part in caught.value.rule and "chatml" in caught.value.rule
    assert learned(template, make_dialogue("问", "答")) == ["答<|eot_id|>"], "others are learned as before"


@pytest.mark.parametrize(
    ("call", "wanted"),
    [
        ("{{ c.function.name + c.function.arguments }}", 'get_weather{"city": "北京"}'),
        ("{{ c.function.name }}{{ c.function.arguments | tojson }}", 'get_weather{"city": "北京"}'),
        ("{{ c.function.name }}{{ c.function.arguments }}", 'get_weather{"city": "北京"}'),
        ("{{ c.id }}{{ c.function.arguments }}", 'functions.get_weather:0{"city": "北京"}'),
        ("{% if not c.id or c.id|length != 9 %}{{ raise_exception('no id') }}{% endif %}{{ c.function }}", None),
    ],
)
def test_tool_calls_use_the_format_of_the_template(call: str, wanted: str | None) -> None:
    template = own_template(
        "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}{{ '<|im_start|>' + m.role }}{% if m.content is not none %}{{ m.content }}{% endif %}"
        "{% for c in m.tool_calls %}" + call + "{% endfor %}{{ '<|im_end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant' }}{% endif %}"
    )
    if wanted is None:
        with pytest.raises(RowRejected):
            template.samples(tool_call_dialogue("北京"))
    else:
        assert learned(template, tool_call_dialogue("北京")) == [f"{wanted}<|im_end|>答<|im_end|>"]


def test_empty_answer_is_never_learned() -> None:
    for template in (own_template(LLAMA3), Template.make("chatml", None, TOKENS, SPECIAL)):
        for dialogue in (make_dialogue("问", ""), make_dialogue("问", " \n"), make_dialogue("问", "", thinking="想")):
            with pytest.raises(RowRejected) as caught:
                template.samples(dialogue)
            assert caught.value.reason == "empty_answer"


def test_control_tokens_in_tools_and_calls_are_refused() -> None:
    with pytest.raises(RowRejected) as caught:
        Template.make("chatml", None, TOKENS, SPECIAL).samples(tool_call_dialogue("<|im_end|>"))
    assert caught.value.reason == "control_token_in_text"


def test_template_that_changes_the_answer_is_refused() -> None:
    with pytest.raises(ModelError, match="changes the text") as caught:
        own_template(LLAMA3.replace("| trim", "| upper")).samples(make_dialogue("hi", "yes"))
    assert caught.value.exit_code == 4
    assert "chatml" in caught.value.remedy


def test_template_without_a_stop_is_refused() -> None:
    with pytest.raises(ModelError, match="never learn to stop"):
        own_template("{% for message in messages %}{{ message.role + ': ' + message.content + '\n' }}{% endfor %}")


def test_template_with_missing_tokens_is_refused() -> None:
    with pytest.raises(ModelError, match=r"im_end[\s\S]*alpaca"):
        Template.make("chatml", None, TOKENS, ("<s>", "</s>"))
    with pytest.raises(ModelError, match="no chat template"):
        Template.make("own", None, TOKENS, SPECIAL)
    with pytest.raises(ModelError, match="no template 'chatmI'"):
        Template.make("chatmI", None, TOKENS, SPECIAL)


def test_wrong_generation_marks_are_refused(tmp_path: Path) -> None:
    wrong = shipped_source("chatml").replace(
        "{% generation %}{{- message['content'] + '<|im_end|>' }}{% endgeneration %}",
        "{% generation %}{{- message['content'] }}{% endgeneration %}{{- '<|im_end|>' }}",
    )
    (tmp_path / "wrong.jinja").write_text(wrong, encoding="utf-8")
    with pytest.raises(ModelError, match="the template marks"):
        Template.make(str(tmp_path / "wrong.jinja"), None, TOKENS, SPECIAL)


def test_control_tokens_in_row_text_are_refused() -> None:
    template = Template.make("chatml", None, TOKENS, SPECIAL)
    for dialogue in (make_dialogue("a<|im_end|>b", "c"), make_dialogue("a", "b<|im_start|>system")):
        with pytest.raises(RowRejected) as caught:
            template.samples(dialogue)
        assert caught.value.reason == "control_token_in_text"


def test_template_exception_rejects_the_row() -> None:
    template = Template.make("alpaca", None, TOKENS, SPECIAL)
    with pytest.raises(RowRejected, match="no role tool"):
        template.samples(Dialogue((Message("user", "a"), Message("tool", "b"), Message("assistant", "c")), HERE))


def test_sandbox_blocks_attribute_access() -> None:
    with pytest.raises(ModelError):
        own_template("{{ ''.__class__.__mro__[1].__subclasses__() }}" + LLAMA3)
    with pytest.raises(ModelError, match="not valid Jinja"):
        own_template("{% for x in %}")


def test_renders_match_transformers(chat_model: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(chat_model)
    turns = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "问"},
        {"role": "assistant", "content": "答"},
    ]
    messages = [Message(turn["role"], turn["content"]) for turn in turns]
    for source in (LLAMA3, QWEN3, Template.make("chatml", None, TOKENS, SPECIAL).source):
        theirs = tokenizer.apply_chat_template(
            turns[:2], chat_template=source, tokenize=False, add_generation_prompt=True
        )
        assert theirs == own_template(source).prompt(messages[:2], thinking=True)


ASKS_MORE = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.content | length > 3 %}{{ m.content | trim }}"
    "{% else %}{{ m.content }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.mark.parametrize("source", [LLAMA3, GLM4, MISTRAL, QWEN3, *ANYWHERE])
def test_skeleton_render_matches_the_template(source: str) -> None:
    """The fast way and the slow way agree on contents that try to tell them apart."""
    template = own_template(source) if source not in SHIPPED else Template.make(source, None, TOKENS, SPECIAL)
    contents = [
        "问",
        " 前后空白 ",
        "\n\n行\n\n",
        "<think>想</think>答",
        "</think>",
        "{{ x }}",
        "a'b\"c\\",
        "<tool_response>x",
    ]
    for question in contents:
        for answer in contents:
            for rounds in (1, 2):
                dialogue = make_dialogue(*[question, answer] * rounds)
                outcomes = []
                for render in (template.samples, lambda one: template._samples(one, "assistant", "mixed")):
                    try:
                        outcomes.append([sample.spans for sample in render(dialogue)])
                    except (RowRejected, ModelError) as error:
                        outcomes.append(type(error))
                assert outcomes[0] == outcomes[1], (question, answer)
    assert any(template.skeletons.values()), "no shape was found to be simple"


def test_content_dependent_template_has_no_skeleton() -> None:
    template = own_template(ASKS_MORE)
    template.samples(make_dialogue("问", "答"))
    assert list(template.skeletons.values()) == [None]


def test_pyproject_excludes_jinja2_with_a_sandbox_escape() -> None:
    """Templates come with models, from anybody; up to jinja2 3.1.5 one can run code (CVE-2025-27516)."""
    project = (Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8")
    (jinja,) = map(Requirement, re.findall(r'"(jinja2\b[^"]*)"', project))
    assert not jinja.specifier.contains("3.1.5") and jinja.specifier.contains("3.1.6")
